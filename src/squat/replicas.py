"""Statistics of a batch that is spread over processes (data parallelism: DDP, FSDP).

Every process has a part of the batch and a replica of the model. What is a mean over the batch needs no care,
because the replicas' gradients are averaged. What is not linear in the batch does: a quantile, a largest
magnitude, the logarithm of a mean. With the functions here it comes out as if one process had the
whole batch; where there is only one, they do nothing.

Every process must have the same number of tokens, as windows of one length have.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def count() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process speaks for all; a launcher says so before they know each other."""
    return os.environ.get("RANK", "0") == "0"


def wait() -> None:
    """Until every process is here: what each of them has written is then there."""
    if count() > 1:
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """The mean of x over the processes, any shape; with gradient to each process's x."""
    return x if count() == 1 else all_reduce(x) / count()


@torch.no_grad()
def largest(x: Tensor) -> Tensor:
    """Elementwise the largest of the processes' x, any shape."""
    if count() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The processes' x, one after the other: [n] to [processes * n]."""
    if count() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
