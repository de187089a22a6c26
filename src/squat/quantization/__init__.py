"""Float model to fake-quantized model: numerics, quantizers, token policies, sites, checkpoints."""

from squat.quantization.config import SquatConfig
from squat.quantization.hf import SquatHfQuantizer, quantize

__all__ = ["SquatConfig", "SquatHfQuantizer", "quantize"]
