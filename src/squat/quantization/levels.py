"""Codes that mean levels: 16 int8 numbers in place of 16 equal steps (docs/format.md, "Levels").

On CPUs with byte dot products a 4-bit activation travels as a byte anyway. So its 16 codes may stand for any
16 int8 levels: dense where values are many, wide apart in the tails. What is multiplied is the level, the
product stays an integer and the scale one. (AdaLog, arXiv 2407.12951, and LogNP of QuartDepth, arXiv
2503.16709, choose such levels by a formula; here they are those of least squared error.)

A value is first rounded to 8 bits, then to the level next to it: so that the levels of least error are those
of a histogram of 256 bins, and are found exactly.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from gguf.quants import IQ4_NL
from numpy.typing import NDArray
from torch import Tensor

from squat.quantization.numerics import Snap

LEVELS = 16
LOWEST, HIGHEST = -128, 127

WEIGHT_LEVELS: dict[str, tuple[int, ...] | None] = {
    "uniform": None,
    # Those of GGUF's type: nearly the levels of least squared error for a normal distribution.
    "iq4_nl": IQ4_NL.kvalues,
}
"""What the 4-bit codes of weights stand for."""


def thresholds(levels: Tensor) -> Tensor:
    """The largest code of each level but the last: in a tie a code goes to the lower level."""
    return torch.div(levels[:-1] + levels[1:], 2, rounding_mode="floor")


def snap_to(levels: Tensor) -> Snap:
    """The function from 8-bit codes, whole numbers of any shape, to the levels next to them.

    Args:
        levels: [16], ascending.
    """
    every = torch.arange(LOWEST, HIGHEST + 1, device=levels.device)
    nearest = levels[torch.bucketize(every, thresholds(levels))].float()
    table = F.pad(nearest, (0, 1), value=torch.nan)  # what is no number stays none

    def snap(codes: Tensor) -> Tensor:
        # One look at a table is many times as fast as a search; a weight's rounding asks very often.
        index = codes.sub(LOWEST).nan_to_num_(nan=len(nearest)).int().clamp_(0, len(nearest))
        if index.dim() == 1:
            return table.index_select(0, index)
        return table.index_select(0, index.flatten()).view(codes.shape)

    return snap


def best_levels(weight: NDArray[np.float64]) -> NDArray[np.int64]:
    """The 16 levels of least squared error, exactly, by dynamic programming over the bins.

    Args:
        weight: how much each of the codes -128 .. 127 counts: [256].

    Returns:
        ascending and distinct codes [16].
    """
    codes = np.arange(LOWEST, HIGHEST + 1, dtype=np.float64)
    weight = weight + 1e-12 * max(weight.sum(), 1.0)  # codes that were not seen count a little
    mass, first, second = (
        np.concatenate([[0.0], np.cumsum(weight * codes**power)]) for power in (0, 1, 2)
    )
    # cost[end, start]: the error of one level for the codes start .. end - 1, their rounded mean.
    end, start = np.arange(257)[:, None], np.arange(257)
    total = np.where(end > start, mass[end] - mass, 1.0)
    sums = first[end] - first
    level = np.rint(sums / total)
    cost = (second[end] - second) - 2 * level * sums + level**2 * total
    cost[end <= start] = np.inf
    best, through, back = cost[:, 0], np.empty_like(cost), []
    for _ in range(LEVELS - 1):
        np.add(cost, best, out=through)
        back.append(through.argmin(axis=1))
        best = through[start, back[-1]]
    ends = [256]
    for choice in reversed(back):
        ends.append(int(choice[ends[-1]]))
    ends = [*reversed(ends)]
    return level[ends, [0, *ends[:-1]]].astype(np.int64)


def fit_levels(codes: Tensor, weight: Tensor) -> Tensor:
    """The best levels for a sample of 8-bit codes: int64 [16].

    Args:
        codes: [...], whole numbers from -128 to 127.
        weight: [...], how much the error of each counts.
    """
    bins = (codes.flatten() - LOWEST).long()
    histogram = torch.bincount(bins, weight.flatten().double(), minlength=256)
    return torch.from_numpy(best_levels(histogram.cpu().numpy())).to(codes.device)
