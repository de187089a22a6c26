"""Training that leaves the finite numbers stops at once and says where.

One NaN is in every weight a step later: what would go on training is no model any more, and a checkpoint of
it would be in the way of the good ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from squat.errors import DivergedError

_WAY_OUT = "lower the learning rate, or train more steps with warmup"


def check_step(model: nn.Module, losses: Mapping[str, Tensor], where: str) -> None:
    """Refuse what a backward pass found, before the weights take it in.

    Args:
        model: has the gradients.
        losses: each term of the loss, in the order in which they are to be named.
        where: of the message, as in "step 7".

    Raises:
        DivergedError: a loss or a gradient is NaN or infinite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)
    bad = next((name for name, loss in losses.items() if not torch.isfinite(loss).all()), None)
    if bad is None and torch.isfinite(largest):
        return
    what = "the gradient is not finite" if bad is None else f"{bad} is {losses[bad].mean():g}"
    raise DivergedError(f"{where}: {what} ({_first_not_finite(model)}); {_WAY_OUT}")


def check_weights(model: nn.Module, where: str) -> None:
    """Refuse weights that no training can go on from.

    Raises:
        DivergedError: a parameter is NaN or infinite.
    """
    if (name := not_finite(model.named_parameters())) is not None:
        raise DivergedError(f"{where}: {name} is no longer finite; {_WAY_OUT}")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that has a value that is NaN or infinite."""
    return next((name for name, values in tensors if not torch.isfinite(values).all()), None)


def _first_not_finite(model: nn.Module) -> str:
    """The first parameter, in the model's order; where all are finite, the gradient nearest to the loss."""
    parameters = list(model.named_parameters())
    if (name := not_finite(parameters)) is not None:
        return f"the first weights that are not finite are {name}"
    gradients = [(name, p.grad) for name, p in reversed(parameters) if p.grad is not None]
    name = not_finite(gradients)
    return f"on the way back, the first gradient that is not finite is that of {name}"
