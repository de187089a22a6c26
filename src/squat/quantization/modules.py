"""The modules that a quantized model is made of.

Weights are quantized where they stand: each module of `QUANTIZED` is its float counterpart with a
quantizer between the weight and the product, under the same parameter names.
Activations are quantized at sites: a `SiteQuantizer` on the module whose input the site is, so that a
tensor that several matrices read is quantized once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from squat.quantization.config import ADAPTIVE, FLOAT, SITES, Bits
from squat.quantization.hadamard import hadamard, hadamard_product
from squat.quantization.numerics import exact_product, subsample
from squat.quantization.quantizers import LearnedStepQuantizer, method_of

WIDE, NARROW = 8, 4
"""The two widths of a token-adaptive site."""


class QuantizedWeight(nn.Module):
    """What the modules below share: a quantizer between their weight and its use."""

    weight_quantizer: LearnedStepQuantizer

    @classmethod
    def wrap(cls, module: nn.Module, quantizer: LearnedStepQuantizer) -> Self:
        """The same module with `quantizer` on its weight; parameters are shared, not copied."""
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = module.__dict__.copy()
        wrapped._modules = {**module._modules, "weight_quantizer": quantizer}
        return wrapped

    def codes(self) -> Tensor:
        """The weight's integer codes, int8 [out features or entries, in features]."""
        return self.weight_quantizer.codes(self.get_parameter("weight").detach())


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """A linear layer's product, exact in eval mode: weight [out features, in features]."""
    if training:
        return F.linear(input, weight, bias)
    product = exact_product(input, weight.T)
    return product if bias is None else product + bias


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """A linear layer that multiplies with its quantized weight; the bias stays in float."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in features] to [..., out features]."""
        return _multiply(input, self.weight_quantizer(self.weight), self.bias, self.training)


class QuantizedConv1D(QuantizedWeight, Conv1D):
    """GPT-2's linear layer, whose weight is [in features, out features]: the other way round."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in features] to [..., out features]."""
        return _multiply(input, self.weight_quantizer(self.weight).T, self.bias, self.training)

    def codes(self) -> Tensor:
        """As of a linear layer: int8 [out features, in features]."""
        return super().codes().T.contiguous()


class QuantizedEmbedding(QuantizedWeight, nn.Embedding):
    """An embedding table of quantized rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] to vectors [..., hidden size]."""
        # With one step per table, quantizing the rows that were looked up gives the same codes as
        # looking up rows of the quantized table, for a fraction of the work.
        return self.weight_quantizer(super().forward(input), whole=self.weight)


QUANTIZED: dict[type[nn.Module], type[QuantizedWeight]] = {
    nn.Linear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
    nn.Embedding: QuantizedEmbedding,
}
"""By exactly this type: a subclass computes something else."""


class SiteQuantizer(nn.Module):
    """Quantizes the activations of one site of one layer.

    `bits` is one width for all tokens, or "4:8": then it owns a step for each width, and `forward`
    needs to know which tokens are wide. FLOAT bits make it pass everything through. For calibration it
    can collect a sample of what comes instead of quantizing it. `block`: what comes is first transformed by
    Hadamard matrices of this size.
    """

    def __init__(self, site: str, layer: int, bits: Bits, method: str, block: int = 1) -> None:
        super().__init__()
        self.site, self.layer = site, layer
        self.block = block
        self.adaptive = bits == ADAPTIVE
        self.follows = SITES[site].follows
        if bits == ADAPTIVE:
            widths: tuple[int, ...] = (WIDE, NARROW)
        else:
            widths = () if bits == FLOAT else (bits,)
        row = method_of(method)
        signed = SITES[site].signed and not row.one_sided
        by_width = {str(b): row.activations(b, signed) for b in widths}
        for quantizer in by_width.values():
            quantizer.spread = True
        self.by_width = nn.ModuleDict(by_width)
        self.collecting = False
        self.sample: dict[str, list[Tensor]] = {}

    def quantizer(self, bits: int) -> LearnedStepQuantizer:
        """The quantizer for tokens of this width."""
        module = self.by_width[str(bits)]
        assert isinstance(module, LearnedStepQuantizer)
        return module

    def forward(self, x: Tensor, wide: Tensor | None = None) -> Tensor:
        """x on the lattice of each token's width; same shape and dtype.

        Args:
            x: any shape, its tokens along the dimensions that `wide` does not broadcast over.
            wide: bool, broadcasts against x; needed at a token-adaptive site only.
        """
        if self.block > 1:
            x = (hadamard_product if self.training else hadamard)(x, self.block)
        if self.collecting:
            self._collect(x.detach(), wide)
            return x
        if not self.by_width:
            return x
        if not self.adaptive:
            (quantizer,) = self.by_width.values()
            return quantizer(x)
        assert wide is not None, (
            f"{self.site} of layer {self.layer} was not told the tokens' widths"
        )
        at_wide, at_narrow = self.quantizer(WIDE), self.quantizer(NARROW)
        # Both widths in one pass: every token brings its own step and range.
        step = torch.where(wide, at_wide.step_for(x, wide), at_narrow.step_for(x, ~wide))
        qmin = torch.where(wide, at_wide.qmin, at_narrow.qmin)
        qmax = torch.where(wide, at_wide.qmax, at_narrow.qmax)
        return at_wide.quantize(x, step, qmin, qmax)

    def start_collecting(self, keep: bool = True) -> None:
        """From now on pass tensors through and keep a sample of them, or nothing at all."""
        self.collecting = True
        self.sample = {name: [] for name in self.by_width} if keep else {}

    def _collect(self, x: Tensor, wide: Tensor | None) -> None:
        for name, parts in self.sample.items():
            chosen = x
            if self.adaptive:
                assert wide is not None
                chosen = x[(wide if name == str(WIDE) else ~wide).expand_as(x)]
            parts.append(subsample(chosen))

    def initialize(self, method: str) -> None:
        """Set every step from the collected sample; a width that saw no token takes the other's."""
        everything = torch.cat(
            [part for parts in self.sample.values() for part in parts] or [torch.zeros(1)]
        )
        for name, parts in self.sample.items():
            own = torch.cat(parts)
            self.quantizer(int(name)).initialize(own if own.numel() else everything, method)
        self.collecting, self.sample = False, {}
