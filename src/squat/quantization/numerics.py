"""The arithmetic of fake quantization, as pure functions.

A symmetric uniform quantizer with one step size per tensor (paper eq. 1-7):

    code  = round(clip(x / step, qmin, qmax))          an integer
    value = step * code                                what the model computes with

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
from typing import Any

import torch
from torch import Tensor

Bound = Any
"""A smallest or largest code: an int for all elements, or a tensor that broadcasts."""

MIN_STEP = 2.0**-14
"""The smallest normal fp16 number: below it a step would lose bits."""
MAX_STEP = 65504.0
"""The largest finite fp16 number."""


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Smallest and largest code of a `bits` wide integer: (-8, 7) for signed 4 bits."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def representable_step(step: Tensor) -> Tensor:
    """The nearest step that fp16 represents exactly, as float32."""
    return step.clamp(MIN_STEP, MAX_STEP).half().float()


def quantize_codes(x: Tensor, step: Tensor, qmin: Bound, qmax: Bound) -> Tensor:
    """Integer codes of x (any shape) as float32: round(clip(x * (1 / step), qmin, qmax)).

    `step`, `qmin` and `qmax` broadcast against x.
    """
    codes = x.float() * step.reciprocal()
    return codes.round_().clamp_(qmin, qmax)


class _StepFromLog(torch.autograd.Function):
    """exp(log_step), snapped to fp16; the snap is straight-through and the LSQ scale is applied."""

    @staticmethod
    def forward(ctx: Any, log_step: Tensor, gradient_scale: float) -> Tensor:
        # Through float64, so that the last bit of `exp` on another machine cannot change the fp16 step.
        step = representable_step(log_step.double().exp().float())
        ctx.save_for_backward(step)
        ctx.gradient_scale = gradient_scale
        return step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (step,) = ctx.saved_tensors
        return grads[0] * step * ctx.gradient_scale, None


def step_from_log(log_step: Tensor, numel: int = 1, qmax: int = 1) -> Tensor:
    """The step size alpha = exp(log_step), representable in fp16; same shape, float32.

    Steps are learned as logarithms: they stay positive, and an optimizer that normalises its updates
    (Adam) changes a large and a small step by the same ratio. The gradient with respect to alpha is
    scaled by 1 / sqrt(numel * qmax) as LSQ does, `numel` being the elements that share the step.
    """
    return _StepFromLog.apply(log_step, 1.0 / math.sqrt(max(numel, 1) * qmax))


class _FakeQuantize(torch.autograd.Function):
    """One node of the graph: saves x alone and recomputes the codes in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: Bound, qmax: Bound) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.bounds = (qmin, qmax)
        return quantize_codes(x, step, qmin, qmax).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, step = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        grad = grads[0]
        scaled = x.float() * step.reciprocal()
        inside = (scaled >= qmin) & (scaled <= qmax)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        codes = scaled.round().clamp_(qmin, qmax)
        per_element = codes.addcmul_(scaled, inside.float(), value=-1.0).mul_(grad)
        return grad_x, per_element.sum_to_size(step.shape), None, None


def fake_quantize(x: Tensor, step: Tensor, qmin: Bound, qmax: Bound) -> Tensor:
    """x rounded to the lattice `step * {qmin..qmax}`; shape and dtype of x.

    In float32 the result equals `quantize_codes(...) * step` bit for bit. `step`, `qmin` and `qmax`
    broadcast against x: a step of shape [batch, tokens, 1] gives every token its own.
    """
    return _FakeQuantize.apply(x, step, qmin, qmax)


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


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b without rounding until the end: what an integer product, scaled once, gives.

    A code times a step has at most 19 significant bits, so that products and sums of thousands of them
    are exact in float64; the result is rounded once, to the dtype of a. Evaluation computes this way: it
    depends neither on batching nor on the order of summation, and equals the engine's integers.
    (Apple's GPUs have no float64: there it is an ordinary product.)
    """
    if a.device.type == "mps":
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def subsample(x: Tensor, limit: int = 1 << 17) -> Tensor:
    """At most `limit` elements of x, flat, drawn with replacement and the same every time."""
    x = x.flatten()
    if x.numel() <= limit:
        return x
    generator = torch.Generator(device=x.device).manual_seed(0)
    return x[torch.randint(x.numel(), (limit,), generator=generator, device=x.device)]


def lsq_step(x: Tensor, qmax: int) -> Tensor:
    """LSQ's initial step, 2 * mean|x| / sqrt(qmax): shape [1]."""
    return (2.0 * x.float().abs().mean() / math.sqrt(qmax)).reshape(1)


def max_step(x: Tensor, qmax: int) -> Tensor:
    """The smallest step that clips nothing, max|x| / qmax: shape [1]."""
    return (x.float().abs().amax() / qmax).clamp_min(MIN_STEP).reshape(1)


def mse_step(x: Tensor, qmin: int, qmax: int, candidates: int = 100) -> Tensor:
    """The step of least mean squared error, searched on a geometric grid: shape [1].

    The grid runs from the step that clips nothing down to 1/200 of it; every candidate is
    representable in fp16, so the error is that of the step that will be used. Of a large tensor a sample
    is searched.
    """
    x = subsample(x.float())
    steps = representable_step(
        max_step(x, qmax) * torch.logspace(0, -math.log10(200.0), candidates, device=x.device)
    )
    errors = torch.stack(
        [(quantize_codes(x, step, qmin, qmax).mul_(step) - x).square_().mean() for step in steps]
    )
    return steps[errors.argmin()].reshape(1)
