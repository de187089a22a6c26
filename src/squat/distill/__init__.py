"""Training a quantized student to do what its full-precision teacher does."""

from squat.distill.losses import LossConfig
from squat.distill.trainer import SquatTrainer

__all__ = ["LossConfig", "SquatTrainer"]
