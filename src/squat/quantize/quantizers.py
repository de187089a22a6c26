"""Quantizers: the modules that own a step size.

A quantizer turns a tensor into the nearest values of an integer lattice and learns the lattice's one
step. Methods differ in how they find the step and what gradient they give it; each is a small class and
one row of `QUANTIZERS`. Whether a tensor is a weight or an activation makes no difference to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from squat.errors import ConfigError
from squat.quantize.numerics import (
    code_range,
    fake_quantize,
    lsq_step,
    mse_step,
    quantize_codes,
    step_from_log,
)

INITIAL_STEPS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "lsq": lambda x, qmin, qmax: lsq_step(x, qmax),
    "mse": mse_step,
}
"""How a step size starts: from a sample of the tensor, the smallest and the largest code."""


class LearnedStepQuantizer(nn.Module):
    """LSQ: symmetric, one learned step per tensor (paper eq. 1-7; Esser et al. 2020).

    `log_step` has shape [1]. It is meaningless (NaN) until `initialize` has seen data or a checkpoint
    has been loaded.
    """

    def __init__(self, bits: int, signed: bool = True) -> None:
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = code_range(bits, signed)
        self.log_step = nn.Parameter(torch.full((1,), math.nan))

    @property
    def step(self) -> Tensor:
        """The step size in use: float32 [1], representable in fp16, without gradient."""
        return step_from_log(self.log_step.detach())

    @torch.no_grad()
    def initialize(self, sample: Tensor, method: str) -> None:
        """Set the step from a sample of the tensor by a row of `INITIAL_STEPS`."""
        step = INITIAL_STEPS[method](sample.detach(), self.qmin, self.qmax)
        self.log_step.copy_(step.clamp_min(2.0**-14).double().log())

    def learned_step(self, numel: int) -> Tensor:
        """The step [1] with its LSQ gradient, for a tensor of `numel` elements."""
        return step_from_log(self.log_step, numel, self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """x on the lattice; same shape and dtype."""
        return fake_quantize(x, self.learned_step(x.numel()), self.qmin, self.qmax)

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of x: int8, or uint8 for an unsigned quantizer."""
        dtype = torch.int8 if self.qmin < 0 else torch.uint8
        return quantize_codes(x, self.step, self.qmin, self.qmax).to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bits={self.bits}, codes=[{self.qmin}, {self.qmax}]"


QUANTIZERS: dict[str, type[LearnedStepQuantizer]] = {"lsq": LearnedStepQuantizer}
"""The registry of methods: a new one is a class and a row."""


def quantizer_class(method: str) -> type[LearnedStepQuantizer]:
    """The class of a method; an unknown name raises ConfigError."""
    try:
        return QUANTIZERS[method]
    except KeyError:
        known = ", ".join(QUANTIZERS)
        raise ConfigError(f"method: {method!r} is no quantizer; choose one of {known}") from None
