"""Float model to fake-quantized model: numerics, quantizers, token policies, sites, checkpoints."""

from squat.quantize.config import SquatConfig
from squat.quantize.hf import SquatHfQuantizer, quantize

__all__ = ["SquatConfig", "SquatHfQuantizer", "quantize"]
