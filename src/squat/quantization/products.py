"""Products of codes: what a linear layer multiplies when both of its operands lie on a lattice.

A quantized tensor is codes times steps, and the steps stand outside of the sum. So int8 codes are multiplied,
and exact sums are scaled, as the engine does it: training then sees the very numbers that will run, whatever
precision its gradients have, and evaluation is exact without float64.

On a CPU that has no instructions for it PyTorch's int8 product is many times slower than that of
float32, or saturates. There codes are multiplied as floats, a thousand inputs at a time: whole numbers below
2^24, whose sums are as exact.

The steps of activations are known where they are quantized and needed where they are multiplied, with modules
of transformers in between. So a tensor that was quantized is remembered together with its steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from squat.hardware import is_faster

_steps = WeakTensorKeyDictionary()

_MOST_INPUTS = 1 << 17
"""From here on a sum of products of int8 may leave int32."""
_EXACT_INPUTS = 1 << 10
"""So far float32 holds it exactly."""


def remember_steps(quantized: Tensor, step: Tensor) -> None:
    """Note that a tensor [..., n] is int8 codes times its vectors' steps [..., 1] (or one step, [1]).

    Only of float32 on a CPU: elsewhere there is nothing that would ask.
    """
    asked_for = quantized.dtype == torch.float32 and quantized.device.type == "cpu"
    if asked_for and not torch.compiler.is_compiling():
        _steps[quantized] = step.detach()


def steps_of(tensor: Tensor) -> Tensor | None:
    """The steps that were remembered of this very tensor, if any."""
    if torch.compiler.is_compiling():
        return None
    steps: Tensor | None = _steps.get(tensor)
    return steps


@cache
def _int8_product_pays() -> bool:
    """Whether PyTorch's int8 product is exact on this CPU and faster than that of float32."""
    return _int8_product_is_exact() and is_faster(
        torch._int_mm, lambda a, b: a.float() @ b.float(), torch.int8
    )


def _int8_product_is_exact() -> bool:
    """Where 16-bit sums saturate, it is not."""
    lowest = torch.full((32, 64), -128, dtype=torch.int8)
    highest = torch.full((64, 32), 127, dtype=torch.int8)
    try:
        return all(
            bool((torch._int_mm(a, b) == 64 * int(a[0, 0]) * int(b[0, 0])).all())
            for a in (lowest, highest.T.contiguous())
            for b in (lowest.T, highest)
        )
    except RuntimeError:  # not every build has it
        return False


def _sums(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """codes @ weight_codes^T, exactly: whole numbers, int32 or float32."""
    if _int8_product_pays():
        return torch._int_mm(codes, weight_codes.T)
    parts = zip(
        codes.split(_EXACT_INPUTS, dim=1), weight_codes.split(_EXACT_INPUTS, dim=1), strict=True
    )
    with full_precision(codes):
        sums = [part.float() @ of_weight.float().T for part, of_weight in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).int().sum(0, dtype=torch.int32)


def code_product(
    x: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    exact: bool,
) -> Tensor | None:
    """x @ weight^T of two quantized tensors by their codes; None where that is not possible.

    Args:
        x: float32 [..., in features], codes times steps.
        step: of x, [..., 1], or one for all.
        weight: float32 [out features, in features], codes times steps.
        weight_step: of weight, [out features], or one for all.
        exact: round once, at the end, as the engine does; otherwise after each step's product.

    Returns:
        float32 [..., out features]. Gradients are those of x @ weight^T, in autocast's dtype where it is on.
    """
    if not _possible(x):
        return None
    codes, of_rows = _codes(weight.detach(), weight_step.view(-1, 1))
    return _product(x, step, weight, codes, of_rows, exact)


def frozen_product(
    x: Tensor, step: Tensor, codes: Tensor, weight_step: Tensor, exact: bool
) -> Tensor | None:
    """The same with a weight whose codes, int8 [out features, in features], stand still.

    What has a gradient, beside x, is `weight_step`.
    """
    if not _possible(x):
        return None
    return _product(x, step, None, codes, weight_step.view(-1, 1), exact)


def _possible(x: Tensor) -> bool:
    return x.numel() > 0 and 1 < x.shape[-1] < _MOST_INPUTS


def _product(
    x: Tensor,
    step: Tensor,
    weight: Tensor | None,
    codes: Tensor,
    of_rows: Tensor,
    exact: bool,
) -> Tensor:
    vectors = x.reshape(-1, x.shape[-1])
    of_vectors = (
        step.expand(*x.shape[:-1], 1).reshape(-1, 1) if step.numel() > 1 else step.view(1, 1)
    )
    product = _CodeProduct.apply(vectors, of_vectors, weight, codes, of_rows, exact)
    result: Tensor = product.view(*x.shape[:-1], -1)
    return result


def _codes(quantized: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes of rows of codes * step, and the rows' steps [rows, 1].

    The quotient is off by less than a thousandth. What is no number is no code: the row's step then is none.
    """
    codes = (quantized * step.reciprocal()).round_().to(torch.int8)
    return codes, step + 0 * quantized.sum(dim=1, keepdim=True)


def full_precision(operand: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast does not round the operands of products on a CPU: a lattice is none in bfloat16."""
    return torch.autocast("cpu", enabled=False) if operand.device.type == "cpu" else nullcontext()


class _CodeProduct(torch.autograd.Function):
    """Keeps codes, a quarter of the memory of what they stand for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        weight: Tensor | None,
        weight_codes: Tensor,
        weight_step: Tensor,
        exact: bool,
    ) -> Tensor:
        codes, step = _codes(x, step)
        sums = _sums(codes, weight_codes)
        if exact:  # 31 bits of a sum and 11 of each step: exact until the end
            result = (sums * step.double()).mul_(weight_step.T.double()).float()
        else:
            result = (sums * step).mul_(weight_step.T)
        of_steps = [result] if ctx.needs_input_grad[4] else []
        ctx.save_for_backward(codes, step, weight_codes, weight_step, *of_steps)
        autocast = torch.is_autocast_enabled("cpu")
        ctx.dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        return result

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, None, Tensor | None, None]:
        codes, step, weight_codes, weight_step, *result = ctx.saved_tensors
        of_x = of_weight = of_step = None
        if ctx.needs_input_grad[0]:
            scaled = (grads[0] * weight_step.T).to(ctx.dtype)
            of_x = (scaled @ weight_codes.to(ctx.dtype)).float()
        if ctx.needs_input_grad[2]:
            scaled = (grads[0] * step).to(ctx.dtype)
            of_weight = (scaled.T @ codes.to(ctx.dtype)).float()
        if result:
            of_step = (grads[0] * result[0]).sum(dim=0)[:, None] / weight_step
            of_step = of_step.sum_to_size(weight_step.shape)
        return of_x, None, of_weight, None, of_step, None
