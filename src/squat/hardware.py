"""What PyTorch multiplies fast on this machine.

A CPU without instructions for a dtype emulates it, many times slower than float32. Which CPUs have them, and
which of them PyTorch uses, changes: so it is measured, in milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]

TIMES = 16
"""The first products of a dtype make their kernels; a run that goes on has to decide as it began."""


def is_faster(product: Product, other: Product, dtype: torch.dtype) -> bool:
    """Whether the first of two matrix products of tensors of a dtype takes less time on the CPU.

    In one thread, and by that thread's own time: neither other programs nor how late further threads wake up
    have a say.
    """
    x = torch.ones(128, 512, dtype=dtype)

    def seconds(of: Product) -> float:
        times = []
        for _ in range(TIMES):
            begin = time.thread_time()
            of(x, x.T)
            times.append(time.thread_time() - begin)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(product) < seconds(other)
    finally:
        torch.set_num_threads(threads)


@cache
def bfloat16_pays() -> bool:
    """Whether training in bfloat16 is faster than in float32: on accelerators, and on some CPUs."""
    if torch.accelerator.is_available():
        return True
    return is_faster(torch.matmul, lambda a, b: a.float() @ b.float(), torch.bfloat16)


def in_bfloat16(precision: str) -> bool:
    """Whether a recipe's precision, "auto", "bf16" or "fp32", means bfloat16 here."""
    return precision == "bf16" or (precision == "auto" and bfloat16_pays())
