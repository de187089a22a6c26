"""Codes that stand still, while steps, norms and biases are trained.

Near the original, a code that changes mostly makes things worse, and a few thousand tokens cannot tell
which would not. A row's step answers to all of its inputs, and it can be right to the last bit (the second
phase of EfficientQAT, arXiv 2407.11062, section 3.3).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from squat.errors import ConfigError
from squat.quantization.modules import QuantizedEmbedding, QuantizedWeight


def freeze_codes(model: nn.Module) -> None:
    """From now on every weight is what its codes and its steps say, and of the two only steps are trained.

    Those of the embeddings and of a head are not: most of their rows are hardly ever seen.

    Raises:
        ConfigError: a method whose steps are not learned.
    """
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedWeight):
            continue
        quantizer, weight = module.weight_quantizer, module.get_parameter("weight")
        if not quantizer.learned:
            raise ConfigError(
                f"codes: {name} has no step that is learned, so that with frozen codes nothing is; choose "
                "trained, or method lsq"
            )
        quantizer.frozen = quantizer.codes(weight.detach())
        weight.requires_grad_(False)
    for module in _rarely_seen(model):
        module.weight_quantizer.log_step.requires_grad_(False)


def _rarely_seen(model: nn.Module) -> list[QuantizedWeight]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = [m for m in model.modules() if isinstance(m, QuantizedEmbedding)]
    return [*modules, *([head] if isinstance(head, QuantizedWeight) else [])]


@torch.no_grad()
def write_frozen(model: nn.Module) -> None:
    """Let weights be what frozen codes and the steps of now say, to be saved."""
    for module in model.modules():
        if not isinstance(module, QuantizedWeight):
            continue
        codes = module.weight_quantizer.frozen
        if codes is not None:
            module.get_parameter("weight").copy_(codes * module.weight_quantizer.step)
