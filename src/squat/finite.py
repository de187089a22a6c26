"""Training that leaves the finite numbers stops at once and says where.

One NaN is in every weight a step later: what would go on training is no model any more, and a checkpoint of
it would be in the way of the good ones. Where a batch or a model is spread over processes, all of them stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from squat import replicas
from squat.errors import DivergedError

_WAY_OUT = "lower the learning rate, or train more steps with warmup"


def check_step(model: nn.Module, losses: Mapping[str, Tensor], where: str) -> None:
    """Refuse what a backward pass found, before the weights take it in.

    Args:
        model: has the gradients.
        losses: each term of the loss, in the order in which they are to be named.
        where: of the message, as in "step 7".

    Raises:
        DivergedError: a loss or a gradient is NaN or infinite, here or in another process.
    """
    gradients = [_here(p.grad) for p in model.parameters() if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)
    bad = not_finite(losses.items())
    if not _anywhere(bad is not None or not torch.isfinite(largest), largest.device):
        return
    what = "the gradient is not finite" if bad is None else f"{bad} is {losses[bad].mean():g}"
    raise DivergedError(f"{where}: {what} ({_first_not_finite(model)}); {_WAY_OUT}")


def check_weights(model: nn.Module, where: str) -> None:
    """Refuse weights that no training can go on from.

    Raises:
        DivergedError: a parameter is NaN or infinite, here or in another process.
    """
    name = not_finite(model.named_parameters())
    if _anywhere(name is not None, next(model.parameters()).device):
        what = name or "a weight of another process"
        raise DivergedError(f"{where}: {what} is no longer finite; {_WAY_OUT}")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that has a value that is NaN or infinite, of those parts that are here."""
    return next((name for name, t in tensors if not torch.isfinite(_here(t)).all()), None)


def _here(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _anywhere(found: bool, device: torch.device) -> bool:
    """Whether it was found in any process."""
    return bool(replicas.largest(torch.tensor(float(found), device=device)) > 0)


def _first_not_finite(model: nn.Module) -> str:
    """The first parameter, in the model's order; where all are finite, the gradient nearest to the loss."""
    parameters = list(model.named_parameters())
    if (name := not_finite(parameters)) is not None:
        return f"the first weights that are not finite are {name}"
    gradients = [(name, p.grad) for name, p in reversed(parameters) if p.grad is not None]
    if (name := not_finite(gradients)) is not None:
        return f"on the way back, the first gradient that is not finite is that of {name}"
    return "the weights and gradients of this process are finite"
