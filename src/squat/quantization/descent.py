"""Rounding a weight matrix so that its product keeps what it was, not each of its weights.

Of a layer's input there is what the float model has, X, and what the quantized one has, X^q, token by token.
Wanted are codes V and a step for each row so that V X^q is W X. Rows are independent of each other, and for a
row v the squared error is quadratic in v:

    v H v' - 2 c v' + const,    H = X^q' X^q / tokens,    c = w X' X^q / tokens

In `start` columns are rounded one after another, and what a rounding leaves is made up for by the columns
that are still free (GPTQ, arXiv 2210.17323). In `sweep` each column in turn takes the code that is best
while all others stay (QuantEase, arXiv 2309.01885, algorithm 1), and between sweeps each row takes the step
that is best for its codes. As inputs are the quantized ones, weights also make up for what activations lose
(QuartDepth, arXiv 2503.16709), by half: c lies half way between w X' X^q and w H. All the way is best for the
squared error of one matrix on the text at hand, and worse for the network. What noisy inputs predict best is
smaller than what is to be predicted, and a few thousand tokens say more about themselves than about others.

For the same reason v is pulled towards w. How hard is tried out: a quarter of the text is held back, and says
which of several pulls leaves least of an error there (`Evidence`, `best_damping`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from squat.quantization.numerics import Snap, representable_step

_MADE_UP_FOR = 0.5
"""The share of what the inputs have lost that a weight makes up for."""
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Pulls towards the weight itself that are tried, relative to the mean squared input."""
_FIRST = 2
"""The one that is tried first, and taken where there is too little text to try any."""
_TRIED_ROWS = 128
"""Rows of a matrix that try them."""
_HELD_BACK = 4
"""Every such sequence is held back."""
_BLOCK = 64
"""Columns after which the others learn of what was rounded: one matrix product for all of them."""


@dataclass
class Moments:
    """Sums over tokens of a layer's inputs: `gram` X^q' X^q and `cross` X' X^q, [inputs, inputs]."""

    gram: Tensor
    cross: Tensor

    @staticmethod
    def zeros(inputs: int) -> Moments:
        """Of no token yet."""
        return Moments(torch.zeros(inputs, inputs), torch.zeros(inputs, inputs))

    def add(self, quantized: Tensor, original: Tensor) -> None:
        """Count more tokens: both inputs, [tokens, inputs]."""
        self.gram.addmm_(quantized.T, quantized)
        self.cross.addmm_(original.T, quantized)

    def __add__(self, other: Moments) -> Moments:
        """Of the tokens of both."""
        return Moments(self.gram + other.gram, self.cross + other.cross)

    def wanted(self, weight: Tensor) -> Tensor:
        """c of every row of a weight [rows, inputs]."""
        return weight @ torch.lerp(self.gram, self.cross, _MADE_UP_FOR)

    def damped(self, weight: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """H, and c of every row of a weight [rows, inputs], with a pull towards the weight itself."""
        pull = damping * self.gram.diagonal().mean()
        gram = self.gram + pull * torch.eye(len(self.gram))
        return gram, self.wanted(weight) + pull * weight

    def error(self, rounded: Tensor, weight: Tensor) -> float:
        """The squared error of a rounded weight, but for what is the same for all: both [rows, inputs]."""
        return float((rounded * (rounded @ self.gram - 2 * self.wanted(weight))).sum())


class Evidence:
    """Moments of a layer's inputs, with those of some sequences apart, to try out on them what others say."""

    def __init__(self, inputs: int) -> None:
        self.shown, self.held_back = Moments.zeros(inputs), Moments.zeros(inputs)
        self._sequences = 0

    def add(self, quantized: Tensor, original: Tensor) -> None:
        """Count more sequences: both inputs, [sequences, tokens, inputs]."""
        apart = (torch.arange(len(quantized)) + self._sequences + 1) % _HELD_BACK == 0
        self._sequences += len(quantized)
        for moments, which in ((self.shown, ~apart), (self.held_back, apart)):
            if which.any():
                moments.add(quantized[which].flatten(0, 1), original[which].flatten(0, 1))

    @property
    def all(self) -> Moments:
        """Of all sequences."""
        return self.shown + self.held_back

    @property
    def enough(self) -> bool:
        """Whether any sequence is held back."""
        return self._sequences >= _HELD_BACK


def best_damping(weight: Tensor, steps: Tensor, rounded: Snap, evidence: Evidence) -> float:
    """Which of `DAMPINGS` makes a weight best for sequences that it has not seen; see `descend`."""
    first = min(_FIRST, len(DAMPINGS) - 1)
    if not evidence.enough:
        return DAMPINGS[first]
    every = max(1, len(weight) // _TRIED_ROWS)
    part, of_part = weight[::every], steps[::every]

    @cache
    def error(at: int) -> float:
        found, _ = descend(part, of_part, rounded, evidence.shown, 0, DAMPINGS[at])
        return evidence.held_back.error(found, part)

    # The error falls and rises again: no need to try what lies beyond a rise.
    best = first
    for way in (1, -1):
        while 0 <= best + way < len(DAMPINGS) and error(best + way) < error(best):
            best += way
    return DAMPINGS[best]


def descend(
    weight: Tensor,
    steps: Tensor,
    rounded: Snap,
    moments: Moments,
    sweeps: int,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """A weight whose rounded product with quantized inputs is near that of `weight` with the original ones.

    Args:
        weight: float32 [rows, inputs].
        steps: where to start, [rows, 1], or [1, 1] for all rows.
        rounded: the codes next to quotients of elements and steps, of any shape; changes what it is given.
        moments: of the inputs.
        sweeps: how often every input is visited again.
        damping: the pull towards the weight, relative to the mean squared input; see `best_damping`.

    Returns:
        float32 [rows, inputs], each element exactly its code times its step, and as many steps, representable
        in fp16. Where training goes on from there, a code changes only when gradients agree on it: elements
        near a boundary would go to the nearest code again with the first noise.
    """
    gram, target = moments.damped(weight, damping)
    order = gram.diagonal().argsort(descending=True)
    gram = gram[order][:, order].contiguous()
    # An input's elements of all rows are neighbours in what follows: they are rounded together.
    target, steps = target.T[order], steps.T
    codes = _start(target, steps, rounded, gram)
    for _ in range(sweeps):
        steps = _refit(codes, steps, gram, target)
        _sweep(codes, steps, rounded, gram, target)
    return (codes * steps)[order.argsort()].T, steps.T


def _start(target: Tensor, steps: Tensor, rounded: Snap, gram: Tensor) -> Tensor:
    """Codes by rounding input after input, the free ones always at their best: [inputs, rows]."""
    # H = R R' with R upper triangular, by Cholesky from the last input to the first; so inverse H = U' U.
    lower = torch.linalg.cholesky(gram.double().flip(0, 1))
    upper = torch.linalg.solve_triangular(
        lower.flip(0, 1), torch.eye(len(gram), dtype=torch.float64), upper=True
    )
    free = (upper.T @ (upper @ target.double())).float()
    # Row j of U, over its diagonal: how the inputs after j make up for an error of j.
    factor = (upper / upper.diagonal()[:, None]).float()
    codes = torch.empty_like(free)
    inverse_steps = steps.reciprocal()
    for begin in range(0, len(free), _BLOCK):
        end = min(begin + _BLOCK, len(free))
        errors = torch.empty(end - begin, free.shape[1])
        block, makes_up = free[begin:end], factor[begin:end, begin:end, None]
        for j in range(end - begin):
            code = rounded(block[j] * inverse_steps[0])
            torch.addcmul(block[j], code, steps[0], value=-1, out=errors[j])
            codes[begin + j] = code
            block[j + 1 :].addcmul_(makes_up[j, j + 1 :], errors[j], value=-1)
        free[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes


def _refit(codes: Tensor, steps: Tensor, gram: Tensor, target: Tensor) -> Tensor:
    """The steps that are best for given codes, one or each row's; a row of zeros keeps its own."""
    numerator = (target * codes).sum(dim=0, keepdim=True)
    denominator = ((gram @ codes) * codes).sum(dim=0, keepdim=True)
    if steps.numel() == 1:
        numerator, denominator = numerator.sum(1, keepdim=True), denominator.sum(1, keepdim=True)
    fitted = numerator / denominator
    sound = (denominator > 0) & (fitted > 0.5 * steps) & (fitted < 2 * steps)
    return representable_step(torch.where(sound, fitted, steps))


def _sweep(codes: Tensor, steps: Tensor, rounded: Snap, gram: Tensor, target: Tensor) -> None:
    """Every input once takes the best codes while all others stay; `codes` changes in place."""
    inverse_steps, diagonal = steps.reciprocal(), gram.diagonal()[:, None]
    # In steps: what is left to gain, and below how much of it one code more of an input takes.
    residual = target * inverse_steps - gram @ codes
    for begin in range(0, len(codes), _BLOCK):
        end = min(begin + _BLOCK, len(codes))
        local, here = residual[begin:end], gram[begin:end, begin:end, None]
        before = codes[begin:end].clone()
        for j in range(end - begin):
            code = codes[begin + j]
            new = rounded(torch.addcdiv(code, local[j], diagonal[begin + j]))
            local[j + 1 :].addcmul_(here[j, j + 1 :], new - code, value=-1)
            code.copy_(new)
        residual[end:].addmm_(gram[end:, begin:end], codes[begin:end] - before, alpha=-1)
