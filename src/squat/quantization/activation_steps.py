"""Where the steps of activations start, when tokens raise them by powers of two.

A few tokens are hundreds of times larger than all others. With token exponents they have steps of their own
(docs/format.md), and the base step is there for the ordinary ones. So the error that the base step is chosen
by is relative: each token's squared error over its own squared length, averaged over tokens; and as the few
large tokens must come through as well, as much again for all squared errors over all squared lengths. Where
no token has a step of its own, the latter alone counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squat.quantization.levels import HIGHEST, LOWEST, fit_levels, snap_to
from squat.quantization.numerics import (
    Snap,
    fake_quantize,
    power_of_two,
    quantize_codes,
    representable_step,
    token_exponent,
)

_GRID = torch.logspace(0.3, -1.3, 33, base=10.0)
"""Clips that are tried, relative to the largest magnitude of all but one token in a hundred."""
_WIDER = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
"""How far levels may reach beyond the best clip of equal steps."""


def margin_of(bits: int, levels: bool) -> int:
    """How many powers of two of clipping a token puts up with before it raises its step.

    None at 8 bits, nor where 4-bit codes stand for levels, whose tails reach far: a step twice as large hurts
    less than a clipped outlier. With few equal steps it is the reverse (benchmarks/token_steps.py).
    """
    return 1 if bits <= 4 and not levels else 0


def _clips(vectors: Tensor) -> Tensor:
    """Candidates for the magnitude that a base step reaches: [candidates]."""
    return vectors.abs().amax(dim=1).quantile(0.99).clamp_min(1e-6) * _GRID.to(vectors.device)


def _token_steps(vectors: Tensor, step: Tensor, qmax: int, margin: int | None) -> Tensor:
    """The step of each vector: [vectors, 1]."""
    if margin is None:
        return step.expand(len(vectors), 1)
    return step * power_of_two(token_exponent(vectors, step * float(qmax << margin)))


def _weights(vectors: Tensor, margin: int | None) -> Tensor:
    """How much the squared error of each vector counts: [vectors, 1]."""
    squares = vectors.square().sum(dim=1, keepdim=True)
    lengths = squares + 1e-6 * squares.mean() + 1e-30
    whole = (1 / lengths.sum()).expand_as(lengths)
    return whole if margin is None else whole + 1 / (lengths * len(lengths))


def _error(
    vectors: Tensor,
    weights: Tensor,
    steps: Tensor,
    qmin: int,
    qmax: int,
    snap: Snap | None = None,
) -> Tensor:
    error = fake_quantize(vectors, steps, qmin, qmax, snap) - vectors
    return (error.square().sum(dim=1, keepdim=True) * weights).sum()


def token_mse_step(vectors: Tensor, qmin: int, qmax: int, margin: int | None) -> Tensor:
    """The base step of least error, of tokens that may raise it by powers of two: [1].

    Args:
        vectors: float32 [tokens, n], a sample of the site.
        margin: see docs/format.md, "Token exponents"; None: no token raises it.
    """
    weights, steps = _weights(vectors, margin), representable_step(_clips(vectors) / qmax)
    errors = [
        _error(vectors, weights, _token_steps(vectors, step, qmax, margin), qmin, qmax)
        for step in steps
    ]
    return steps[torch.stack(errors).argmin()].reshape(1)


def fit_step_and_levels(vectors: Tensor, margin: int | None) -> tuple[Tensor, Tensor]:
    """The base step and the 16 levels of least error: float32 [1] and int64 [16].

    Arguments as in `token_mse_step`.
    """
    weights = _weights(vectors, margin)
    clip = token_mse_step(vectors, -8, 7, margin) * 7
    found = []
    for wider in _WIDER:
        step = representable_step(clip * wider / HIGHEST)
        steps = _token_steps(vectors, step, HIGHEST, margin)
        codes = quantize_codes(vectors, steps, LOWEST, HIGHEST)
        levels = fit_levels(codes, (weights * steps.square()).expand_as(codes))
        error = _error(vectors, weights, steps, LOWEST, HIGHEST, snap_to(levels))
        found.append((float(error), step, levels))
    _, step, levels = min(found, key=lambda candidate: candidate[0])
    return step.reshape(1), levels
