"""Orthogonal transforms of activations: outliers spread over many elements.

The input of the down projection has a few elements that are ten or thirty times as large as the rest, and
one step size has to serve them all. Multiplied with a Hadamard matrix (every entry 1 or -1, times a scale)
each element becomes a sum over a block of them, of about the same size everywhere, and 4 bits hold it. The
matrix is its own inverse up to a factor: the weight takes the inverse in once, and the product stays what
it was. (BitNet v2, arXiv 2504.18415, and QuaRot, arXiv 2404.00456, do so at the same place.)

There is a Hadamard matrix of every power of two. What is left of a size is odd, and of the blocks that it
counts some are louder than others. They are mixed by Householder reflections along the odd number's prime
factors: each of p elements loses twice their mean. Of three blocks each keeps a ninth of its energy, and
takes four ninths of each other's. A reflection is its own inverse, and costs two operations an element.

The scale is a power of two and sums are taken in pairs, or in order, so that the engine gets the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_AT_ONCE = 128
"""A matrix of this size is multiplied as a whole."""


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides `size`: of a block, what a Hadamard matrix transforms."""
    return size & -size


def scale_of(block: int, inner: int = 1) -> float:
    """The power of two next to 1 / sqrt(n), from above, n = the power of two in block / inner."""
    return 2.0 ** -((_distances(block, inner).bit_length() - 1) // 2)


def inverse_factor(block: int, inner: int = 1) -> float:
    """What the transform applied twice multiplies by: 1, or 2 where the scale is no square root."""
    return _distances(block, inner) * scale_of(block, inner) ** 2


def _distances(block: int, inner: int) -> int:
    return power_of_two_in(block) // inner


def odd_factors(block: int) -> list[int]:
    """The odd prime factors of a block, ascending: 3, 3 for 576."""
    rest, factors, candidate = block // power_of_two_in(block), [], 3
    while rest > 1:
        if rest % candidate == 0:
            factors.append(candidate)
            rest //= candidate
        else:
            candidate += 2
    return factors


def hadamard(x: Tensor, block: int, inner: int = 1) -> Tensor:
    """Each block of the last dimension transformed; shape of x.

    Float32 sums and differences at distance `inner`, then twice that, ..., within the power of two in the
    block, times `scale_of`; then the reflections of `odd_factors`. Every operation is rounded on its own.

    Args:
        x: [..., n], whole blocks.
        block: any size.
        inner: a power of two, the elements that have been transformed among themselves already.
    """
    power = power_of_two_in(block)
    y, distance = x.reshape(-1, power), inner
    while distance < power:
        pairs = y.view(-1, power // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2)
        distance *= 2
    return _reflect(y * scale_of(block, inner), block).view(x.shape)


def hadamard_product(x: Tensor, block: int, inner: int = 1) -> Tensor:
    """The same with matrix products, which are faster to train with; rounded otherwise."""
    power, shape = power_of_two_in(block), x.shape
    if inner == 1:
        inner = _inner_of(power)
        x = x.reshape(-1, inner) @ _matrix(inner, x.device, x.dtype)
    if power > inner:
        x = _matrix(power // inner, x.device, x.dtype) @ x.reshape(-1, power // inner, inner)
    if block > power:
        x = _reflections(block // power, x.device, x.dtype) @ x.reshape(-1, block // power, power)
    return x.view(shape)


def _inner_of(power: int) -> int:
    """The size of a first product, of two: one matrix takes many times as long as its factors.

    Of an even number of factors of two, whose scale is then a square root.
    """
    exponent = power.bit_length() - 1
    return power if power <= _AT_ONCE else 1 << (exponent // 2 & ~1)


def _reflect(x: Tensor, block: int) -> Tensor:
    distance = power_of_two_in(block)
    for factor in odd_factors(block):
        parts = x.reshape(-1, factor, distance).unbind(1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        total = total * (2 / factor)
        x = torch.stack([part - total for part in parts], dim=1)
        distance *= factor
    return x


@cache
def _matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return hadamard(torch.eye(block, device=device), block).to(dtype)


@cache
def _reflections(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _reflect(torch.eye(count, device=device), count).view(count, count).to(dtype)


def fold(weight: Tensor, block: int, inner: int = 1) -> Tensor:
    """The weight [outputs, inputs] whose product with `hadamard(x)` is that of `weight` with x."""
    return hadamard(weight, block, inner) / inverse_factor(block, inner)
