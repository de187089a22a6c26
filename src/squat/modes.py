"""Eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode from before outside: a trainer may evaluate in mid-training."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
