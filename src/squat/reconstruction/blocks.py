"""Each decoder layer of a quantized model is trained to hand on what the float model's layer hands on.

A layer's input is what the quantized layers before it really make, its target what the float model has after
that layer. Only one layer's activations and gradients are in memory, and there is no head: a token costs
about half of what it costs end to end. (EfficientQAT, arXiv 2407.11062, section 3.2, "Block-AP"; here
activations are quantized as well.)

The error is relative: a token's squared error over its own squared length, since the next norm divides by
that length, and a few tokens are hundreds of times as long as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.architectures import architecture_of
from squat.data.files import writing
from squat.exact import approximately
from squat.finite import check_step, check_weights
from squat.quantization.tokens import follow_importance
from squat.quantization.walk import Walk

_FINAL_SHARE = 0.05
"""The learning rate at the end of a layer, relative to that at its beginning (cosine in between)."""


class Reconstruction(BaseModel):
    """A recipe's section `reconstruction`: what layers are trained on, and how."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    sequences: int = Field(64, gt=0, description="windows of the training text")
    epochs: int = Field(2, gt=0)
    batch_size: int = Field(4, gt=0, description="sequences in one forward pass")
    learning_rate: float = Field(1e-4, gt=0)
    step_learning_rate: float = Field(2e-3, gt=0, description="of the logarithms of the step sizes")


@approximately()
def reconstruct(
    model: PreTrainedModel,
    original: PreTrainedModel,
    windows: Tensor,
    settings: Reconstruction,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """Train a quantized model layer by layer, in place.

    Args:
        model: quantized and calibrated.
        original: the float model that it was made from.
        windows: token ids [sequences, tokens].
        settings: how.
        folder: keeps every layer that is done; called again with the same folder, training goes on there.
        progress: called with the number of layers that are done, and of all.

    Returns:
        by layer, the mean relative squared error of its output before and after it was trained; nothing
        for layers that were done before.

    Raises:
        DivergedError: a layer's error or gradient is NaN or infinite.
    """
    batches = [b for b in windows.split(settings.batch_size) if len(b) == settings.batch_size]
    batches = [batch.to(model.device) for batch in batches or [windows]]
    model.eval()
    layers = _layers_of(model)
    with torch.no_grad():
        stream = Walk(model, layers, batches)
        reference = Walk(original.eval(), _layers_of(original), batches)
    errors = []
    for index, (layer, twin) in enumerate(zip(layers, _layers_of(original), strict=True)):
        with torch.no_grad():
            targets = reference.outputs(twin, index)
        done = None if folder is None else folder / f"layer-{index}.safetensors"
        if done is None or not _load(layer, done):
            before = _error(stream, layer, index, targets)
            _train(stream, layer, index, targets, settings)
            errors.append((before, _error(stream, layer, index, targets)))
            if done is not None:
                _save(layer, done)
        with torch.no_grad():
            stream.step(layer, index)
        reference.hidden = targets
        if progress is not None:
            progress(index + 1, len(layers))
    return errors


def _layers_of(model: PreTrainedModel) -> list[nn.Module]:
    row = architecture_of(model.config.model_type)
    return list(model.get_submodule(row.layers).children())


def _load(layer: nn.Module, file: Path) -> bool:
    """Whether the layer was trained before, and what is kept of it can be read."""
    try:
        layer.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _save(layer: nn.Module, file: Path) -> None:
    with writing(file) as out:
        out.write(save({name: value.contiguous() for name, value in layer.state_dict().items()}))


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    squares = (output.float() - target).square().sum(-1)
    return (squares / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def _error(stream: Walk, layer: nn.Module, index: int, targets: Sequence[Tensor]) -> float:
    pairs = zip(stream.outputs(layer, index), targets, strict=True)
    return float(torch.stack([_relative_error(o, t) for o, t in pairs]).mean())


def _train(
    stream: Walk,
    layer: nn.Module,
    index: int,
    targets: Sequence[Tensor],
    settings: Reconstruction,
) -> None:
    steps = [p for name, p in layer.named_parameters() if name.endswith("log_step")]
    others = [p for name, p in layer.named_parameters() if not name.endswith("log_step")]
    groups = [
        {"params": others, "lr": settings.learning_rate},
        {"params": steps, "lr": settings.step_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = settings.epochs * len(targets)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / total))
        ),
    )
    order = torch.Generator().manual_seed(index)  # a layer's own, so that resuming changes nothing
    layer.train()
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(targets), generator=order).tolist():
            error = _relative_error(stream.output(layer, index, batch), targets[batch])
            error.backward()
            check_step(layer, {"the error": error.detach()}, f"reconstruction: layer {index}")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            follow_importance(layer)
    layer.eval()
    check_weights(layer, f"reconstruction: layer {index}")
