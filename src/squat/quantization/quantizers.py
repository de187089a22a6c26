"""Quantizers: the modules that own step sizes.

A quantizer turns a tensor into values of an integer lattice, `code * step`, with one step for the whole
tensor or for each of its rows. Methods differ in where the step comes from, in what stands in for rounding
while training, and in what gradient the step gets; each is a small class, and a row of `QUANTIZERS` says
which class a method uses for weights and which for activations.

| class | step | training | gradient of the step |
|---|---|---|---|
| LearnedStepQuantizer (LSQ) | learned | rounds | of rounding and clipping |
| MinMaxQuantizer | the largest magnitude | rounds | none |
| DorefaQuantizer | the largest tanh of a magnitude | rounds tanh(x) | none |
| PactQuantizer | learned clip | rounds | of clipping alone |
| NoiseQuantizer (NIPQ) | learned clip | adds noise | of the noise and clipping |

In eval mode all of them round in the same way, so that all of them export and run in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squat import replicas
from squat.errors import ConfigError
from squat.quantization.levels import snap_to
from squat.quantization.numerics import (
    Bound,
    Snap,
    code_range,
    fake_quantize,
    lsq_step,
    max_step,
    mse_step,
    quantize_codes,
    representable_step,
    step_from_log,
    straight_through,
)

InitialSteps = Callable[[Tensor, int, int], Tensor]
"""Of rows [rows, n], the smallest and the largest code: a step for each row, [rows]."""

INITIAL_STEPS: dict[str, InitialSteps] = {
    "lsq": lambda x, qmin, qmax: lsq_step(x, qmax),
    "mse": mse_step,
}
"""How learned steps start."""


class LearnedStepQuantizer(nn.Module):
    """LSQ: symmetric, learned steps (paper eq. 1-7; Esser et al. 2020). Other methods depart from it.

    With `levels`, 4-bit codes stand for these 16 numbers, which are what is called codes here
    (docs/format.md, "Levels").

    `log_step` has the shape given, which broadcasts against the tensor: [1] for one step a tensor, as in the
    paper; [rows, 1], or [1, rows] where a weight is stored the other way round, for one step an output row.
    It is meaningless (NaN) until `initialize` has seen data or a checkpoint has been loaded.
    """

    log_step: Tensor
    spread = False
    """Whether each process of several has a part of the tensor: activations, not weights."""
    learned = True
    """Whether steps have gradients."""
    bypassed = False
    """Whether everything passes through as it is."""
    coarse = False
    """Whether steps have few bits: tokens multiply them."""
    frozen: Tensor | None = None
    """The codes of a weight, int8 in its shape, where they stand still (module `frozen`)."""

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        shape: tuple[int, ...] = (1,),
        levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.levels = bits, levels
        self.qmin, self.qmax = (
            code_range(bits, signed) if levels is None else (levels[0], levels[-1])
        )
        self.log_step = nn.Parameter(torch.full(shape, math.nan), requires_grad=self.learned)

    @property
    def on_lattice(self) -> bool:
        """Whether what comes out is codes times steps."""
        return not self.bypassed

    @property
    def step(self) -> Tensor:
        """The step sizes in use: float32, representable in fp16, without gradient; shape of `log_step`."""
        return step_from_log(self.log_step.detach(), coarse=self.coarse)

    def rows(self, x: Tensor) -> Tensor:
        """The elements of x that share a step: [steps, elements]."""
        if self.log_step.numel() == 1:
            return x.reshape(1, -1)
        return x if self.log_step.shape[0] > 1 else x.T

    def snap(self, device: torch.device) -> Snap | None:
        """What turns 8-bit codes into levels, where there are any."""
        return None if self.levels is None else snap_to(torch.tensor(self.levels, device=device))

    @torch.no_grad()
    def initialize(self, sample: Tensor, method: str) -> None:
        """Set the steps from the tensor, or a sample of it, by a row of `INITIAL_STEPS`.

        With levels it is always by the squared error.
        """
        rows, snap = self.rows(sample.detach().float()), self.snap(sample.device)
        if snap is not None:
            self.start_at(mse_step(rows, self.qmin, self.qmax, snap))
        else:
            self.start_at(INITIAL_STEPS[method](rows, self.qmin, self.qmax))

    @torch.no_grad()
    def start_at(self, steps: Tensor) -> None:
        """Set the steps, as many as there are, to the nearest that can be represented."""
        steps = representable_step(steps, self.coarse)
        self.log_step.copy_(steps.double().log().view(self.log_step.shape))

    def transform(self, x: Tensor) -> Tensor:
        """What is quantized in place of x; same shape."""
        return x

    def step_for(self, x: Tensor, part: Tensor | None = None) -> Tensor:
        """The steps for a pass over x, with their gradient; shape of `log_step`.

        Args:
            x: the whole tensor that has these steps.
            part: bool, broadcasts against x: the elements that this quantizer is for; None: all.
        """
        numel = x.numel() // self.log_step.numel() * (replicas.count() if self.spread else 1)
        return step_from_log(self.log_step, numel, self.qmax, self.coarse)

    def quantize(
        self, x: Tensor, step: Tensor, qmin: Bound, qmax: Bound, snap: Snap | None = None
    ) -> Tensor:
        """x on the lattice, or what stands in for it while training; arguments as `fake_quantize`."""
        return fake_quantize(x, step, qmin, qmax, snap)

    def forward(self, x: Tensor) -> Tensor:
        """x on the lattice; same shape and dtype."""
        if self.bypassed:
            return x
        if self.frozen is not None:
            return (self.frozen * self.step_for(x)).to(x.dtype)
        snap = self.snap(x.device)
        return self.quantize(self.transform(x), self.step_for(x), self.qmin, self.qmax, snap).to(
            x.dtype
        )

    def lookup(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of a table on the lattice: [...] to [..., n], without the work of the whole table."""
        if self.bypassed:
            return F.embedding(ids, table)
        step = self.step_for(table)
        if step.numel() > 1:
            step = F.embedding(ids, step)
        rows = self.transform(F.embedding(ids, table))
        snap = self.snap(table.device)
        return self.quantize(rows, step, self.qmin, self.qmax, snap).to(table.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of x: int8, or uint8 for an unsigned quantizer."""
        dtype = torch.int8 if self.qmin < 0 else torch.uint8
        snap = self.snap(x.device)
        return quantize_codes(self.transform(x), self.step, self.qmin, self.qmax, snap).to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bits={self.bits}, codes=[{self.qmin}, {self.qmax}]"


class MinMaxQuantizer(LearnedStepQuantizer):
    """The step that clips nothing, max|x| / qmax (LLM-QAT, arXiv 2305.17888, with static activations).

    Nothing is learned: in training mode the step follows the largest magnitude by an exponential moving
    average, in eval mode it is frozen; it is saved with the model.
    """

    momentum = 0.95
    learned = False

    @torch.no_grad()
    def initialize(self, sample: Tensor, method: str) -> None:
        """Set the steps that clip nothing of a sample; `method` is for steps that are learned."""
        self.start_at(self._largest(sample))

    def _largest(self, x: Tensor) -> Tensor:
        return max_step(self.rows(self.transform(x.detach().float())), self.qmax)

    def step_for(self, x: Tensor, part: Tensor | None = None) -> Tensor:
        """The steps, after they have moved towards those of x in training mode."""
        if self.training:
            self._follow(x, part)
        return self.step

    @torch.no_grad()
    def _follow(self, x: Tensor, part: Tensor | None) -> None:
        largest = self._largest(x if part is None else x * part)
        if self.spread:
            largest = replicas.largest(largest)
        largest = largest.view(self.log_step.shape)
        moved = self.momentum * self.log_step + (1 - self.momentum) * largest.log()
        if part is not None:  # in a batch without tokens of its width it stays
            seen = replicas.largest(part.any().float())
            moved = torch.where(seen > 0, moved, self.log_step)
        self.log_step.copy_(moved)


class DorefaQuantizer(MinMaxQuantizer):
    """DoReFa's weights: tanh(w), scaled by its largest magnitude (arXiv 1606.06160, eq. 9).

    Two departures. The scale stays in the step, max|tanh w| / qmax, where DoReFa leaves weights in [-1, 1]
    for a batch normalisation to scale: these models have none. And the lattice has a zero, as an integer
    product without zero points needs it, where DoReFa's consists of half-integers.
    """

    def transform(self, x: Tensor) -> Tensor:
        """tanh(x), through float64: the same code from every machine's tanh."""
        return x.double().tanh().float()


class PactQuantizer(LearnedStepQuantizer):
    """PACT: a learned clip, which learns from the elements that it clips (arXiv 1805.06085, eq. 1-3).

    The clip alpha is qmax * step. The published one cuts off negative values; this one has both signs
    unless `signed` is False.
    """

    def quantize(
        self, x: Tensor, step: Tensor, qmin: Bound, qmax: Bound, snap: Snap | None = None
    ) -> Tensor:
        """x on the lattice; the gradient is that of clipping."""
        clipped = torch.clamp(x.float(), qmin * step, qmax * step)
        value = fake_quantize(x.detach().float(), step.detach(), qmin, qmax, snap)
        return straight_through(value, clipped).to(x.dtype)


class NoiseQuantizer(LearnedStepQuantizer):
    """NIPQ: while training, noise in place of rounding, inside a learned clip (arXiv 2206.00820, section 4).

    The noise is drawn from the rounding errors that the tensor itself would have, at random places, as the
    authors' code does by a histogram. In eval mode it rounds. Widths are given, not learned.
    """

    @property
    def on_lattice(self) -> bool:
        """Noise is on none."""
        return super().on_lattice and not self.training

    def quantize(
        self, x: Tensor, step: Tensor, qmin: Bound, qmax: Bound, snap: Snap | None = None
    ) -> Tensor:
        """x with noise inside of the clip, the clip outside of it."""
        if not self.training:
            return super().quantize(x, step, qmin, qmax, snap)
        wide = x.float()
        with torch.no_grad():
            scaled = wide * step.reciprocal()
            errors = (scaled.round() - scaled).flatten()
            places = torch.randint(errors.numel(), (errors.numel(),), device=x.device)
            noise = errors[places].view_as(x)
        noisy = torch.where(scaled > qmin, wide + noise * step, qmin * step)
        return torch.where(scaled < qmax, noisy, qmax * step).to(x.dtype)


@dataclass(frozen=True)
class Method:
    """A method's classes; `one_sided` activations are clipped to [0, alpha] and have unsigned codes."""

    weights: type[LearnedStepQuantizer]
    activations: type[LearnedStepQuantizer]
    one_sided: bool = False


QUANTIZERS: dict[str, Method] = {
    "lsq": Method(LearnedStepQuantizer, LearnedStepQuantizer),
    "minmax": Method(MinMaxQuantizer, MinMaxQuantizer),
    "pact": Method(DorefaQuantizer, PactQuantizer),
    "nipq": Method(NoiseQuantizer, NoiseQuantizer),
    # As the authors' code compares them: every negative activation is lost. The engine has no unsigned
    # activations, and the exporter refuses them.
    "pact-one-sided": Method(DorefaQuantizer, PactQuantizer, one_sided=True),
    "nipq-one-sided": Method(NoiseQuantizer, NoiseQuantizer, one_sided=True),
}
"""The registry of methods: a new one is a class and a row."""


def method_of(name: str) -> Method:
    """The row of a method; an unknown name raises ConfigError."""
    try:
        return QUANTIZERS[name]
    except KeyError:
        known = ", ".join(QUANTIZERS)
        raise ConfigError(f"method: {name!r} is no quantizer; choose one of {known}") from None
