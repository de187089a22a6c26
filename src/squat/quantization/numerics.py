"""The arithmetic of fake quantization, as pure functions.

A symmetric uniform quantizer (paper eq. 1-7):

    code  = round(clip(x / step, qmin, qmax))          an integer
    value = step * code                                what the model computes with

A step stands where an integer product has room for it, outside of the sum over the inner dimension: one for a
weight matrix (the paper's) or for each of its output rows, one for an activation site or, times a number of
few bits, for each of its tokens.

Three rules make the same numbers come out of PyTorch and of the integer engine:

* the division is a product with `1 / step`, rounded to float32 first, and rounding is to nearest with
  ties to even: what `rint` and every SIMD rounding instruction do;
* a step is always a number that fp16 represents exactly, because fp16 is what a GGUF block stores;
* all of it happens in float32, also under autocast.

Gradients are those of LSQ (Esser et al. 2020, arXiv 1902.08153): straight through to x inside the clip
range and zero outside of it; to the step, `code - x / step` inside and the clip bound outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Bound = Any
"""A smallest or largest code: an int for all elements, or a tensor that broadcasts."""

Snap = Callable[[Tensor], Tensor]
"""Of codes as float32 the codes next to them that there are; a new tensor."""

MIN_STEP = 2.0**-14
"""The smallest normal fp16 number: below it a step would lose bits."""
MAX_STEP = 65504.0
"""The largest finite fp16 number."""
MAX_COARSE_STEP = 65408.0
"""The largest of these with `COARSE` bits behind the point."""
COARSE = 8
"""Bits behind the point of a step that tokens multiply by numbers of two such bits: products of two tokens'
steps, and of one with a weight's step, are then exact in float32."""
MAX_EXPONENT = 31
"""The largest exponent by which a token raises a step."""


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Smallest and largest code of a `bits` wide integer: (-8, 7) for signed 4 bits."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def representable_step(step: Tensor, coarse: bool = False) -> Tensor:
    """The nearest step that fp16 represents exactly, with `coarse` in `COARSE` bits, as float32."""
    if coarse:
        dropped = 23 - COARSE
        bits = step.float().contiguous().view(torch.int32) + (1 << (dropped - 1))
        step = ((bits >> dropped) << dropped).view(torch.float32).clamp(max=MAX_COARSE_STEP)
    return step.clamp(MIN_STEP, MAX_STEP).half().float()


def quantize_codes(
    x: Tensor, step: Tensor, qmin: Bound, qmax: Bound, snap: Snap | None = None
) -> Tensor:
    """Integer codes of x (any shape) as float32: round(clip(x * (1 / step), qmin, qmax)), then snapped.

    `step`, `qmin` and `qmax` broadcast against x; `snap` as in `fake_quantize`.
    """
    codes = (x.float() * step.reciprocal()).round_().clamp_(qmin, qmax)
    return codes if snap is None else snap(codes)


def row_codes(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes of rows of which each one's largest element has the same code, straight through to x.

    Args:
        x: [..., n], not negative, a row's largest element at least 1e-30: below it `inverse` overflows.
            Rows of a softmax have one of 1 / n at least.
        largest: that code.

    Returns:
        The codes as float32, [..., n], and how many of them are 1, [..., 1].
    """
    peak = x.detach().float().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(peak, largest) / peak  # a number over a tensor would be rounded twice
    scaled = x.float() * inverse
    return scaled.detach().round() + (scaled - scaled.detach()), inverse


class _StepFromLog(torch.autograd.Function):
    """exp(log_step), snapped to fp16; the snap is straight-through and the LSQ scale is applied."""

    @staticmethod
    def forward(ctx: Any, log_step: Tensor, gradient_scale: float, coarse: bool) -> Tensor:
        # Through float64, so that the last bit of `exp` on another machine cannot change the fp16 step.
        step = representable_step(log_step.double().exp().float(), coarse)
        ctx.save_for_backward(step)
        ctx.gradient_scale = gradient_scale
        return step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (step,) = ctx.saved_tensors
        return grads[0] * step * ctx.gradient_scale, None, None


def step_from_log(log_step: Tensor, numel: int = 1, qmax: int = 1, coarse: bool = False) -> Tensor:
    """The step size alpha = exp(log_step), a `representable_step`; same shape, float32.

    Steps are learned as logarithms: they stay positive, and an optimizer that normalises its updates
    (Adam) changes a large and a small step by the same ratio. The gradient with respect to alpha is
    scaled by 1 / sqrt(numel * qmax) as LSQ does, `numel` being the elements that share the step.
    """
    return _StepFromLog.apply(log_step, 1.0 / math.sqrt(max(numel, 1) * qmax), coarse)


class _FakeQuantize(torch.autograd.Function):
    """One node of the graph: saves x alone and recomputes the codes in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, qmin: Bound, qmax: Bound, snap: Snap | None
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.bounds, ctx.snap = (qmin, qmax), snap
        return quantize_codes(x, step, qmin, qmax, snap).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, step = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        grad = grads[0]
        scaled = x.float() * step.reciprocal()
        inside = (scaled >= qmin) & (scaled <= qmax)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None
        codes = scaled.round().clamp_(qmin, qmax)
        if ctx.snap is not None:
            codes = ctx.snap(codes)
        per_element = codes.addcmul_(scaled, inside.float(), value=-1.0).mul_(grad)
        return grad_x, per_element.sum_to_size(step.shape), None, None, None


def fake_quantize(
    x: Tensor, step: Tensor, qmin: Bound, qmax: Bound, snap: Snap | None = None
) -> Tensor:
    """x rounded to the lattice `step * {qmin..qmax}`; shape and dtype of x.

    In float32 the result equals `quantize_codes(...) * step` bit for bit. `step`, `qmin` and `qmax`
    broadcast against x: a step of shape [batch, tokens, 1] gives every token its own. `snap` maps codes to
    some of them, of which `qmin` and `qmax` are then the ends.
    """
    return _FakeQuantize.apply(x, step, qmin, qmax, snap)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, instead: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def straight_through(value: Tensor, instead: Tensor) -> Tensor:
    """`value`, exactly; its gradient goes to `instead`, of the same shape and dtype."""
    return _StraightThrough.apply(value, instead)


def token_exponent(x: Tensor, largest: Tensor) -> Tensor:
    """Exponents e by which vectors raise their step to step * 2^e (docs/format.md, "Token exponents").

    The smallest whole number from 0 to 31 with max|x| <= largest * 2^e: nothing is rounded on the way.

    Args:
        x: [..., n], vectors along the last dimension.
        largest: the magnitude up to which e is 0; broadcasts against [..., 1].

    Returns:
        int32 [..., 1].
    """
    peak = x.detach().float().abs().amax(dim=-1, keepdim=True)
    mantissa, exponent = torch.frexp(peak)
    limit_mantissa, limit_exponent = torch.frexp(largest.float())
    raised = exponent - limit_exponent + (mantissa > limit_mantissa).int()
    raised = torch.where(peak.isinf(), MAX_EXPONENT, torch.where(peak > 0, raised, 0))
    return raised.clamp(0, MAX_EXPONENT).int()


def peak_multiplier(x: Tensor) -> Tensor:
    """What vectors multiply their step by (docs/format.md, "Peaks"): float32 [..., 1].

    The largest magnitude of each vector of x [..., n], rounded up to two bits behind the point, over 128.
    """
    peak = x.detach().float().abs().amax(dim=-1, keepdim=True)
    quarters = ((peak.view(torch.int32) + ((1 << 21) - 1)) >> 21) - 4 * (127 + 7)
    return ((quarters.clamp(-128, 127) + 4 * 127) << 21).view(torch.float32)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exactly, for exponents from -126 to 127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def subsample(x: Tensor, limit: int = 1 << 17) -> Tensor:
    """At most `limit` entries of x along its first dimension, drawn without replacement, always the same."""
    if len(x) <= limit:
        return x
    generator = torch.Generator(device=x.device).manual_seed(0)
    return x[torch.randperm(len(x), generator=generator, device=x.device)[:limit].sort().values]


def lsq_step(x: Tensor, qmax: int) -> Tensor:
    """LSQ's initial step, 2 * mean|x| / sqrt(qmax), of each row: [rows, n] to [rows]."""
    return 2.0 * x.float().abs().mean(dim=1) / math.sqrt(qmax)


def max_step(x: Tensor, qmax: int) -> Tensor:
    """The smallest step that clips nothing, max|x| / qmax, of each row: [rows, n] to [rows]."""
    return (x.float().abs().amax(dim=1) / qmax).clamp_min(MIN_STEP)


_AT_ONCE = 1 << 18
"""Elements whose error is computed at once: what fits a cache, and enough work for a GPU."""


def mse_step(x: Tensor, qmin: int, qmax: int, snap: Snap | None = None) -> Tensor:
    """The step of least mean squared error of each row: [rows, n] to [rows]; `snap` as in `fake_quantize`.

    Searched on a geometric grid, then on a finer one beside the best. The grid runs from the step that clips
    nothing down to 1/200 of it for a whole tensor, to 1/10 for one of several rows, which has fewer outliers
    to clip; every candidate is representable in fp16, so the error is that of the step that will be used.
    """
    smallest, candidates = (200.0, 40) if len(x) == 1 else (10.0, 20)
    ratio = smallest ** (-1 / (candidates - 1))
    coarse = ratio ** torch.arange(candidates, device=x.device)
    fine = ratio ** (torch.arange(-3, 4, device=x.device) / 4)
    rows = max(1, _AT_ONCE // x.shape[1])
    steps = []
    for part in x.float().split(rows):
        largest = max_step(part, qmax)
        start = _least_error(part, largest, coarse, qmin, qmax, snap)
        steps.append(_least_error(part, start, fine, qmin, qmax, snap))
    return torch.cat(steps)


def _least_error(
    x: Tensor, start: Tensor, ratios: Tensor, qmin: int, qmax: int, snap: Snap | None
) -> Tensor:
    """Of the steps start * ratio that of least squared error, row by row."""
    best, least = start, torch.full_like(start, torch.inf, dtype=torch.float64)
    buffer = x.new_empty(max(x.shape[1], min(x.numel(), _AT_ONCE)))  # fresh memory is slow memory
    for ratio in ratios:
        step = representable_step(start * ratio)
        error = torch.zeros_like(start, dtype=torch.float64)
        for part in x.split(_AT_ONCE, dim=1):
            room = buffer[: part.numel()].view(part.shape)
            torch.mul(part, step[:, None].reciprocal(), out=room)
            codes = room.round_().clamp_(qmin, qmax)
            values = (codes if snap is None else snap(codes)).mul_(step[:, None])
            error += torch.linalg.vector_norm(values.sub_(part), dim=1).double().square()
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best
