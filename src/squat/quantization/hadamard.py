"""The Hadamard transform of activations: outliers spread over many elements.

The input of the down projection has a few elements that are ten or thirty times as large as the rest, and
one step size has to serve them all. Multiplied with a Hadamard matrix (every entry 1 or -1, times a scale)
each element becomes a sum over a block of them, of about the same size everywhere, and 4 bits hold it. The
matrix is its own inverse up to a factor: the weight takes the inverse in once, and the product stays what
it was. (BitNet v2, arXiv 2504.18415, and QuaRot, arXiv 2404.00456, do so at the same place.)

The scale is a power of two and sums are taken in pairs, so that the engine gets the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def block_of(size: int) -> int:
    """The largest power of two that divides `size`: the block that is transformed together."""
    return size & -size


def scale_of(block: int) -> float:
    """The power of two next to 1 / sqrt(block), from above: 2^-floor(log2(block) / 2)."""
    return 2.0 ** -((block.bit_length() - 1) // 2)


def inverse_factor(block: int) -> float:
    """What the transform applied twice multiplies by: 1, or 2 where the scale is no square root."""
    return block * scale_of(block) ** 2


def hadamard(x: Tensor, block: int) -> Tensor:
    """Each block of the last dimension times `scale_of(block)` times a Hadamard matrix; shape of x.

    Float32 sums of neighbours at distance 1, then 2, 4, ...: each is rounded on its own, in any order
    of the pairs.
    """
    y, distance = x.reshape(-1, block), 1
    while distance < block:
        pairs = y.view(-1, block // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2)
        distance *= 2
    return (y * scale_of(block)).view(x.shape)


def hadamard_product(x: Tensor, block: int) -> Tensor:
    """The same as one matrix product, which is faster to train with; rounded otherwise."""
    return (x.unflatten(-1, (-1, block)) @ _matrix(block, x.device, x.dtype)).flatten(-2)


@cache
def _matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return hadamard(torch.eye(block, device=device), block).to(dtype)


def fold(weight: Tensor, block: int) -> Tensor:
    """The weight [outputs, inputs] whose product with `hadamard(x)` is that of `weight` with x."""
    return hadamard(weight, block) / inverse_factor(block)
