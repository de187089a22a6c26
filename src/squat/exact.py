"""What a quantized model computes in eval mode, defined to the last bit.

Integers multiply exactly everywhere; norms, softmax, SiLU, GELU and RoPE do not: how a float sum is ordered
and how `exp` rounds differs from library to library, and a last bit now and then decides a rounding, or
a token's width. So in eval mode a quantized model computes these steps as docs/format.md defines them, with
elementary float32 operations, sums in float64, and an exponential function of its own. The engine does the
same: the logits of the two are the same bits. In training mode everything is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    SiLUActivation,
)

_exact = True


@contextmanager
def approximately() -> Iterator[None]:
    """Inside, evaluation does not compute to the last bit, and is several times as fast: for calibration."""
    global _exact
    before, _exact = _exact, False
    try:
        yield
    finally:
        _exact = before


def is_exact(module: nn.Module) -> bool:
    """Whether a module computes as the engine does, to the last bit: in eval mode, unless told otherwise."""
    return _exact and not module.training


def exact_product(a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    """a @ b, times `scale`, without rounding until the end: what an integer product, scaled once, gives.

    A code times a step has at most 19 significant bits, so that products and sums of thousands of them
    are exact in float64; the result is rounded once, to the dtype of a. Evaluation computes this way: it
    depends neither on batching nor on the order of summation, and equals the engine's integers.
    (Apple's GPUs have no float64: there it is an ordinary product.)
    """
    if a.device.type == "mps":
        return a @ b if scale is None else (a @ b) * scale
    product = a.double() @ b.double()
    return (product if scale is None else product * scale).to(a.dtype)


_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves no bits for a fraction
_POLYNOMIAL = (
    0.0013814539415761828,
    0.00836874544620514,
    0.04166838899254799,
    0.1666652113199234,
    0.4999999403953552,
)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, the highest power's coefficient first."""
    p = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        p = p * x + coefficient
    return p


def exponential(x: Tensor) -> Tensor:
    """exp(x) in float32, relative error below 1e-7 for x in [-64, 64], where x is clamped.

    2^n * exp(r) with n = rint(x / ln 2); a polynomial for exp(r), |r| <= ln(2) / 2; no fused
    multiply-add.
    """
    x = x.clamp(-64.0, 64.0)
    n = (x * 1.44269504 + _MAGIC) - _MAGIC
    r = x - n * 0.693359375  # ln 2 in two parts; the first product is exact
    r = r - n * -2.12194440e-4
    p = _polynomial(_POLYNOMIAL, r) * r * r + r + 1.0
    return p * ((n.int() + 127) << 23).view(torch.float32)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension: float32 terms, summed in float64."""
    terms = exponential(x - x.amax(dim=-1, keepdim=True))
    return terms / terms.double().sum(dim=-1, keepdim=True).float()


_POWERS = (0.05500905960798264, 0.2422109693288803, 0.6932829022407532, 1.0)


def powers_of_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """2^(x - max) over the last dimension, to 1e-4, and their sum, [..., 1]: a softmax not yet divided.

    In float32, whatever x is. What is 64 or more below the largest counts as nothing. The sum is one of
    multiples of 2^-23, which no order changes.
    """
    x = (x - x.amax(dim=-1, keepdim=True)).float()
    shifted = x + _MAGIC
    r = x - (shifted - _MAGIC)
    p = _polynomial(_POWERS, r)
    power = (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    terms = torch.where(x > -64.0, power, 0.0)
    return terms, ((terms + 1.0) - 1.0).double().sum(dim=-1, keepdim=True).float()


def octaves(scaling: float) -> float:
    """What scores are multiplied by in place of `scaling` for a softmax of powers of two, in float32."""
    return float(torch.tensor(scaling) * torch.tensor(1.44269504))


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x / (1.0 + exponential(-x))


def inverse_root(x: Tensor) -> Tensor:
    """1 / sqrt(x), each of the two operations rounded correctly.

    PyTorch's own float32 square root is not (MKL's is off by a last bit for one number in six), so it is
    taken in float64, where the error is too small to change the float32 that it is rounded to.
    """
    return 1.0 / x.double().sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)); the mean in float64."""
    mean_square = x.double().square().mean(dim=-1, keepdim=True).float()
    return weight * (x * inverse_root(mean_square + epsilon))


class ExactRMSNorm(nn.Module):
    """An RMSNorm of transformers that is `rms_norm` in eval mode."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Tensor = norm.weight
        self.epsilon: float = (
            norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        )

    def gain(self) -> Tensor:
        """What elements are multiplied by."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same."""
        if is_exact(self):
            return rms_norm(x, self.gain(), self.epsilon)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return self.gain() * (wide * scale).to(x.dtype)


class ExactCenteredRMSNorm(ExactRMSNorm):
    """The same where what is learned is the gain less 1 (Gemma)."""

    def gain(self) -> Tensor:
        """What elements are multiplied by."""
        return 1.0 + self.weight


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel mixed with its last tokens: the sum of weight[tap] * x, oldest token first, in float32.

    Args:
        x: [batch, channels, tokens]; before the first token there are zeros.
        weight: [channels, taps], the last tap the token's own.
    """
    tokens, taps = x.shape[-1], weight.shape[1]
    padded = F.pad(x, (taps - 1, 0))
    products = (weight[:, tap, None] * padded[..., tap : tap + tokens] for tap in range(taps))
    total = next(products)
    for product in products:
        total = total + product
    return total


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, with the tanh written out: x / (1 + exp(-2 * sqrt(2 / pi) * ...))."""
    inner = 1.59576912 * (x + 0.044715 * (x * x * x))
    return x / (1.0 + exponential(-inner))


_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""Of a polynomial for erfc(z) exp(z^2) (Abramowitz and Stegun 7.1.26, error below 1.5e-7)."""


def gelu(x: Tensor) -> Tensor:
    """GELU by the error function: x * (1 - erfc(x / sqrt(2)) / 2), below zero x * erfc(-x / sqrt(2)) / 2."""
    z = x.abs() * 0.70710677
    t = 1.0 / (1.0 + 0.3275911 * z)
    half = 0.5 * x * (_polynomial(_ERFC, t) * t * exponential(-(z * z)))
    return torch.where(x < 0, half, x - half)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm; mean and variance in float64."""
    wide = x.double()
    mean = wide.mean(dim=-1, keepdim=True)
    variance = (wide - mean).square().mean(dim=-1, keepdim=True).float()
    return (x - mean.float()) * inverse_root(variance + epsilon) * weight + bias


class ExactLayerNorm(nn.LayerNorm):
    """A LayerNorm that is `layer_norm` in eval mode."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, nn.LayerNorm)
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., hidden size] to the same."""
        if not is_exact(self):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)


class ExactSiLU(nn.Module):
    """SiLU that is `silu` in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return silu(x) if is_exact(self) else F.silu(x)


class ExactGELUTanh(nn.Module):
    """GELU in its tanh form ("gelu_new", "gelu_pytorch_tanh") that is `gelu_tanh` in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return gelu_tanh(x) if is_exact(self) else F.gelu(x, approximate="tanh")


class ExactGELU(nn.Module):
    """GELU by the error function ("gelu") that is `gelu` in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return gelu(x) if is_exact(self) else F.gelu(x)


_ACTIVATIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.SiLU: ExactSiLU,
    SiLUActivation: ExactSiLU,
    NewGELUActivation: ExactGELUTanh,
    GELUTanh: ExactGELUTanh,
    GELUActivation: ExactGELU,
}


def exact_activation(activation: nn.Module) -> nn.Module:
    """The exact counterpart of an activation function; the function itself where there is none."""
    exact = _ACTIVATIONS.get(type(activation))
    return activation if exact is None else exact()


class ExactRotary(nn.Module):
    """A rotary embedding of transformers whose cosines and sines are correctly rounded in eval mode.

    Where kinds of layers have frequencies of their own, it is asked for those of one kind.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch, tokens, rotated elements] of the positions [batch, tokens]."""
        kind: tuple[str, ...] = () if layer_type is None else (layer_type,)
        if not is_exact(self):
            return self.rotary(x, position_ids, *kind)
        frequencies, scale = (
            getattr(self.rotary, "_".join((*kind, name)))
            for name in ("inv_freq", "attention_scaling")
        )
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1).double()
        return angles.cos().float() * scale, angles.sin().float() * scale
