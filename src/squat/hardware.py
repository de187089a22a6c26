"""What PyTorch multiplies fast on this machine.

A CPU without instructions for a dtype emulates it, many times slower than float32. Which CPUs have them, and
which of them PyTorch uses, changes: so it is measured, in a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]

_SIZE = 512
"""Of the matrices: with smaller ones it would be measured how fast threads wake up."""
_ROUNDS = 6
"""Of both, in turn: whatever else the machine does, each is once left alone."""


def is_faster(product: Product, other: Product, dtype: torch.dtype) -> bool:
    """Whether the first of two matrix products of tensors of a dtype takes less time on the CPU."""
    x = torch.ones(_SIZE, _SIZE, dtype=dtype)

    def seconds(of: Product) -> float:
        begin = time.perf_counter()
        of(x, x.T)
        return time.perf_counter() - begin

    rounds = [(seconds(product), seconds(other)) for _ in range(_ROUNDS)]
    ours, others = map(min, zip(*rounds, strict=True))
    return ours < others


@cache
def bfloat16_pays() -> bool:
    """Whether training in bfloat16 is faster than in float32: on accelerators, and on some CPUs."""
    if torch.accelerator.is_available():
        return True
    return is_faster(torch.matmul, lambda a, b: a.float() @ b.float(), torch.bfloat16)


def in_bfloat16(precision: str) -> bool:
    """Whether a recipe's precision, "auto", "bf16" or "fp32", means bfloat16 here."""
    return precision == "bf16" or (precision == "auto" and bfloat16_pays())
