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
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from squat.exact import exact_product, is_exact
from squat.quantization.activation_steps import fit_step_and_levels, margin_of, token_mse_step
from squat.quantization.config import ADAPTIVE, SITES, SquatConfig
from squat.quantization.hadamard import hadamard, hadamard_product, inverse_factor
from squat.quantization.levels import HIGHEST, LEVELS, snap_to
from squat.quantization.numerics import (
    Bound,
    Snap,
    peak_multiplier,
    power_of_two,
    row_codes,
    subsample,
    token_exponent,
)
from squat.quantization.products import code_product, frozen_product, remember_steps, steps_of
from squat.quantization.quantizers import LearnedStepQuantizer, method_of

WIDE, NARROW = 8, 4
"""The two widths of a token-adaptive site."""

_SAMPLE = 1 << 17
"""Elements that a site keeps of each batch that it is calibrated on."""


def stored_rows(module: nn.Module) -> Tensor:
    """A view of a layer's weight, float or quantized, whose rows are its outputs: [outputs, inputs]."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


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
        """What integer products multiply: the weight's codes, or the levels that they mean.

        int8 [out features or entries, in features].
        """
        return self.weight_quantizer.codes(self.get_parameter("weight").detach())


def _multiply(
    layer: QuantizedLinear | QuantizedConv1D, input: Tensor, turned: bool = False
) -> Tensor:
    """A linear layer's product with what its quantizer makes of its weight.

    `turned`: the weight is stored as [in features, out features].
    """
    quantizer, bias, exact = layer.weight_quantizer, layer.bias, is_exact(layer)
    frozen, product = quantizer.frozen, None
    on_lattice = quantizer.on_lattice and layer.weight.dtype == torch.float32
    step = steps_of(input) if on_lattice else None
    if step is not None and frozen is not None:
        codes = frozen.T if turned else frozen
        product = frozen_product(input, step, codes, quantizer.step_for(layer.weight), exact)
    if product is None:
        weight = quantizer(layer.weight)
        weight = weight.T if turned else weight
        if step is not None and frozen is None:
            product = code_product(input, step, weight, quantizer.step, exact)
    if product is None and not exact:
        return F.linear(input, weight, bias)
    if product is None:
        product = exact_product(input, weight.T)
    return product if bias is None else product + bias


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """A linear layer that multiplies with its quantized weight; the bias stays in float."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in features] to [..., out features]."""
        return _multiply(self, input)


class QuantizedConv1D(QuantizedWeight, Conv1D):
    """GPT-2's linear layer, whose weight is [in features, out features]: the other way round."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in features] to [..., out features]."""
        return _multiply(self, input, turned=True)

    def codes(self) -> Tensor:
        """As of a linear layer: int8 [out features, in features]."""
        return super().codes().T.contiguous()


class QuantizedEmbedding(QuantizedWeight, nn.Embedding):
    """An embedding table of quantized rows.

    `block` > 1: they are those of a head that expects its input transformed in blocks of this size, and
    are transformed back.
    """

    block = 1

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] to vectors [..., hidden size]."""
        rows = self.weight_quantizer.lookup(self.weight, input)
        if self.block == 1:
            return rows
        transform = hadamard if is_exact(self) else hadamard_product
        with torch.autocast(rows.device.type, enabled=False):
            return transform(rows, self.block)


class QuantizedScaledEmbedding(QuantizedEmbedding):
    """An embedding table whose rows are multiplied by a constant."""

    scalar_embed_scale: float

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] to vectors [..., hidden size]."""
        return super().forward(input) * self.scalar_embed_scale


QUANTIZED: dict[type[nn.Module], type[QuantizedWeight]] = {
    nn.Linear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
    nn.Embedding: QuantizedEmbedding,
    Gemma3TextScaledWordEmbedding: QuantizedScaledEmbedding,
}
"""By exactly this type: a subclass computes something else."""


class SiteQuantizer(nn.Module):
    """Quantizes the activations of one site of one layer.

    A site has one width for all tokens, or two, by importance ("4:8") or because a text's first token is wide
    (`first_alone`): then it owns a step for each width, and `forward` needs to know which tokens are wide.
    It owns both as well where the last `recent` tokens are seen in 8 bits.
    FLOAT bits make it pass everything through. On the way in, `block` > 1:
    the tensor is transformed in blocks of this size, `inner` elements of which have been already. With
    `token_steps` "peak" every vector multiplies the step by its largest magnitude, or nearly; with
    "exponent" it raises the step by a power of two until not much of it is clipped. With `levels`, 4-bit
    codes stand for 16 of the 8-bit codes. With a `center`, [key heads, 1, head size], what is quantized is
    the difference from it. Rows of probabilities may have the same `largest_code` in place of steps. For
    calibration a site can collect a sample of what comes instead of quantizing it; `bypassed` leaves it in
    float. `first` is the model's first layer with attention.
    """

    levels: Tensor | None
    center: Tensor | None

    def __init__(
        self,
        site: str,
        layer: int,
        config: SquatConfig,
        block: int = 1,
        first: int = 0,
        inner: int = 1,
    ) -> None:
        super().__init__()
        self.site, self.layer, self.block, self.inner = site, layer, block, inner
        self.largest_code = config.row_codes_of(site)
        widths = config.widths_of(site, layer, first)
        self.first_alone = config.widens_first(site)
        self.recent = config.recent_of(site, layer, first)
        self.adaptive = self.first_alone or config.bits_of(site, layer, first) == ADAPTIVE
        self.follows = SITES[site].follows
        self.token_steps = config.token_steps_of(site)
        self.learned = method_of(config.method).activations.learned
        row = method_of(config.method)
        signed = SITES[site].signed and not row.one_sided
        by_width = {str(b): row.activations(b, signed) for b in widths}
        for quantizer in by_width.values():
            quantizer.spread = True
            quantizer.coarse = self.token_steps == "peak"
        self.by_width = nn.ModuleDict(by_width)
        has_levels = config.has_levels(site) and NARROW in widths and signed
        self.register_buffer(
            "levels", torch.zeros(LEVELS, dtype=torch.int64) if has_levels else None
        )
        self.register_buffer("center", None)
        largest = {b: by_width[str(b)].qmax for b in widths}
        if has_levels:
            largest[NARROW] = HIGHEST
        # By width; reach: how many steps the largest magnitude may have before a token raises the step.
        self.margin = {b: margin_of(b, has_levels and b == NARROW) for b in widths}
        self.reach = {b: float(code << self.margin[b]) for b, code in largest.items()}
        self.collecting = self.bypassed = False
        self.sample: dict[str, list[Tensor]] = {}

    def quantizer(self, bits: int) -> LearnedStepQuantizer:
        """The quantizer for tokens of this width."""
        module = self.by_width[str(bits)]
        assert isinstance(module, LearnedStepQuantizer)
        return module

    def forward(self, x: Tensor, wide: Tensor | None = None) -> Tensor:
        """x on the lattice of each token's width; same shape and dtype.

        Args:
            x: [..., n], vectors of tokens along the last dimension.
            wide: bool [..., 1], broadcasts against x; needed at a token-adaptive site. One that owns both
                widths can be asked for all in 8 bits.
        """
        dtype, x = x.dtype, self.transformed(x)
        if self.collecting:
            self._collect(x.detach(), wide)
            return x.to(dtype)
        if self.bypassed or not self.by_width:
            return x
        multiplier, seen = self.multiplier(x), x
        if multiplier is not None and not self.learned:
            # A step that follows what comes, and that tokens multiply, sees them all as large.
            seen = x.detach() / multiplier
        if wide is None:
            assert not self.adaptive, (
                f"{self.site} of layer {self.layer} was not told the tokens' widths"
            )
            bits = min(self.reach)
            quantizer, snap = self.quantizer(bits), self._snap(bits)
            step, (qmin, qmax) = quantizer.step_for(seen), self._bounds(bits)
            reach: float | Tensor = self.reach[bits]
        else:
            quantizer, narrow = self.quantizer(WIDE), self.quantizer(NARROW)
            # Both widths in one pass: every token brings its own step and range.
            step = torch.where(wide, quantizer.step_for(seen, wide), narrow.step_for(seen, ~wide))
            (low8, high8), (low4, high4) = self._bounds(WIDE), self._bounds(NARROW)
            qmin, qmax = torch.where(wide, low8, low4), torch.where(wide, high8, high4)
            snap = self._snap(NARROW, wide)
            reach = torch.where(wide, self.reach[WIDE], self.reach[NARROW])
        if multiplier is not None:
            step = step * multiplier
        elif self.token_steps == "exponent":
            step = step * power_of_two(token_exponent(x, step.detach() * reach))
        quantized = quantizer.quantize(x, step, qmin, qmax, snap).to(dtype)
        if quantizer.on_lattice and quantizer.qmin < 0:
            remember_steps(quantized, step)
        return quantized

    def multiplier(self, x: Tensor) -> Tensor | None:
        """What each vector of the transformed x multiplies the step by, [..., 1]; None where none does."""
        if self.token_steps != "peak" or self.collecting or self.bypassed or not self.by_width:
            return None
        return peak_multiplier(x)

    @property
    def makes_codes(self) -> bool:
        """Whether rows become codes by `row_codes`, and not by steps."""
        return self.largest_code is not None and not (self.collecting or self.bypassed)

    def row_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `numerics.row_codes`."""
        assert self.largest_code is not None
        return row_codes(x, self.largest_code)

    def transformed(self, x: Tensor) -> Tensor:
        """What is quantized in place of x."""
        if self.block > 1:
            transform = hadamard if is_exact(self) else hadamard_product
            with torch.autocast(x.device.type, enabled=False):  # what is quantized is in float32
                x = transform(x.float(), self.block, self.inner)
            if self.site == "q":
                # No weight takes in the inverse of what is done to queries and keys: queries do.
                x = x / inverse_factor(self.block)
        return x if self.center is None else x - self.center.to(x.dtype)

    def _bounds(self, bits: int) -> tuple[Bound, Bound]:
        """The smallest and the largest code of a width."""
        if bits == NARROW and self.levels is not None:
            return self.levels[0], self.levels[-1]
        return self.quantizer(bits).qmin, self.quantizer(bits).qmax

    def _snap(self, bits: int, wide: Tensor | None = None) -> Snap | None:
        """What turns 8-bit codes into those of a width, of tokens that are not wide."""
        if bits != NARROW or self.levels is None:
            return None
        snap = snap_to(self.levels)
        return snap if wide is None else lambda codes: torch.where(wide, codes, snap(codes))

    def start_collecting(self, keep: bool = True) -> None:
        """From now on pass tensors through and keep a sample of them, or nothing at all."""
        self.collecting = True
        self.sample = {name: [] for name in self.by_width} if keep else {}

    def _collect(self, x: Tensor, wide: Tensor | None) -> None:
        for name, parts in self.sample.items():
            chosen = x
            if self.adaptive and not (self.recent and name == str(WIDE)):
                assert wide is not None
                chosen = x[(wide if name == str(WIDE) else ~wide).squeeze(-1).expand(x.shape[:-1])]
            vectors = chosen.reshape(-1, x.shape[-1])
            parts.append(subsample(vectors, max(1, _SAMPLE // x.shape[-1])).float())

    @torch.no_grad()
    def initialize(self, method: str) -> None:
        """Set every step from the collected sample; a width that saw no token takes the other's."""
        everything = [part for parts in self.sample.values() for part in parts]
        for name, parts in self.sample.items():
            seen = parts if any(len(part) for part in parts) else everything
            vectors = torch.cat(seen) if seen else torch.zeros(1, 1)
            quantizer, bits = self.quantizer(int(name)), int(name)
            margin = self.margin[bits] if self.token_steps == "exponent" else None
            if self.token_steps == "peak":
                vectors = vectors / peak_multiplier(vectors)
            if bits == NARROW and self.levels is not None:
                step, levels = fit_step_and_levels(vectors, margin)
                self.levels.copy_(levels)
                quantizer.start_at(step)
            elif self.token_steps != "static" and method == "mse":
                quantizer.start_at(token_mse_step(vectors, quantizer.qmin, quantizer.qmax, margin))
            else:
                quantizer.initialize(vectors, method)
        self.collecting, self.sample = False, {}
