"""Checkpoints: `save_pretrained` and `from_pretrained` of quantized models, as for any other model.

Registers `SquatConfig` and a quantizer with transformers, so that a folder whose config.json holds
`"quantization_config": {"quant_method": "squat", ...}` loads through `AutoModelForCausalLM`, and a float
folder loads and is quantized on the way with `quantization_config=SquatConfig(...)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from squat.quantization.calibration import Progress, calibrate
from squat.quantization.config import SquatConfig
from squat.quantization.convert import (
    check_convertible,
    convert,
    fold_transforms,
    self_generated_text,
)
from squat.quantization.scales import balance_channels


@register_quantizer("squat")
class SquatHfQuantizer(HfQuantizer):
    """What transformers asks about a Squat model while loading, saving and training it."""

    quantization_config: SquatConfig
    gathered: dict[str, Tensor] | None = None

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: what `saving` holds, or the model's own state."""
        return self.gathered, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            convert(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            quantize(model, self.quantization_config)

    def is_serializable(self) -> bool:
        """Checkpoints hold the float32 master weights, the step sizes and the thresholds."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training it is what it is for."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All parameters are trained, not adapters beside them."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile sees through the quantizers."""
        return True


register_quantization_config("squat")(SquatConfig)


@contextmanager
def saving(model: Any, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside, `save_pretrained` of a quantized model writes these weights instead of the model's own.

    That is what its argument `state_dict` is for, and what a sharded model needs; transformers ignores the
    argument where a model has a quantizer.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SquatHfQuantizer):
        quantizer.gathered = weights
    try:
        yield
    finally:
        if isinstance(quantizer, SquatHfQuantizer):
            quantizer.gathered = None


def quantize(
    model: PreTrainedModel,
    config: SquatConfig | None = None,
    calibration: Iterable[Tensor] | None = None,
    weights: str = "nearest",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Quantize a float model in place and return it: ready to evaluate (PTQ) or to train (QAT).

    Args:
        model: a causal language model of transformers; its weights become float32 master weights.
        config: what to quantize; the default is W4 with 4:8 tokens.
        calibration: batches of token ids [batch, tokens], all of one shape; by default the model samples
            some itself. An empty list leaves steps unset (NaN), for a checkpoint to fill in.
        weights: "nearest" rounds each weight by itself, "descent" each matrix as a whole.
        progress: called with the number of layers that are calibrated, and of all.

    Raises:
        ConfigError: an architecture without a row, or a model that is quantized already.
    """
    config = config or SquatConfig()
    check_convertible(model)
    torch.nn.Module.float(model)  # transformers' own refuses while it loads and quantizes
    batches = list([self_generated_text(model)] if calibration is None else calibration)
    if config.channel_scales:
        balance_channels(model, config, batches, weights)
    convert(model, config)
    fold_transforms(model, config)
    # From here on transformers treats it like a model that was loaded quantized.
    marks = {
        "hf_quantizer": SquatHfQuantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": config.quant_method,
    }
    for name, value in marks.items():
        setattr(model, name, value)
    model.config.quantization_config = config
    if batches:
        calibrate(model, config, batches, weights, progress)
    return model
