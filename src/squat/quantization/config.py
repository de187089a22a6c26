"""What to quantize and to how many bits: `SquatConfig`, checked once, when it is made.

The config is what stands as `quantization_config` in a checkpoint's config.json, what a recipe's
`quantize:` section holds and what the exporter reads: one description for training and deployment.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from squat.errors import ConfigError
from squat.quantization.quantizers import INITIAL_STEPS, method_of
from squat.quantization.tokens import IMPORTANCE, POLICIES

ADAPTIVE: Final = "4:8"
"""A site whose tokens have 8 or 4 bits each, by the token's importance."""

FLOAT = 32
"""Bits that mean: leave it in floating point (for studies; such a model cannot be exported)."""

Bits = int | Literal["4:8"]


@dataclass(frozen=True)
class Site:
    """A tensor of the graph that is quantized (the sites are defined in docs/format.md).

    `follows`: which layer's importance gives a token its width at this site, or None where the width
    never depends on the token. `bits`: the site's own bits; None: the config's `activation_bits`.
    """

    follows: Literal["previous", "current"] | None
    bits: int | None = None
    signed: bool = True


SITES: dict[str, Site] = {
    "attn_in": Site("previous"),
    "q": Site("previous"),
    "k": Site("previous"),
    "probs": Site(None, bits=8, signed=False),
    "v": Site("current"),
    "attn_out": Site("current"),
    "mlp_in": Site("current"),
    "mlp_mid": Site("current"),
    "head_in": Site(None, bits=8),
}


def _check_bits(name: str, bits: Any, adaptive: bool) -> None:
    if bits == ADAPTIVE and adaptive:
        return
    if isinstance(bits, int) and not isinstance(bits, bool) and (2 <= bits <= 8 or bits == FLOAT):
        return
    choices = (
        "2 to 8" + (f', "{ADAPTIVE}"' if adaptive else "") + f", or {FLOAT} to leave it in float"
    )
    raise ConfigError(f"{name}: {bits!r} bits are not possible; choose {choices}")


def _check_row(name: str, value: str, table: dict[str, Any]) -> None:
    if value not in table:
        raise ConfigError(f"{name}: {value!r} does not exist; choose one of {', '.join(table)}")


@dataclass(kw_only=True)
class SquatConfig(QuantizationConfigMixin):
    """Bits, method and token policy of a quantized model.

    Args:
        weight_bits: bits of every weight matrix in the decoder layers.
        embedding_bits: bits of the embeddings and of the LM head.
        activation_bits: bits of the activations: an integer, or "4:8" for token-adaptive.
        site_bits: bits of single sites that depart from it, such as {"mlp_mid": 8}.
        hadamard: transform the input of the down projection (mlp_mid) by a Hadamard matrix, and its weight by
            the inverse: outliers are spread over many elements, each of which needs fewer bits.
        method: the quantizer, a row of `QUANTIZERS`.
        init: how step sizes start, a row of `INITIAL_STEPS`.
        ratio: rho, the fraction of tokens that get 8 bits at a "4:8" site (paper IV-C).
        policy: "threshold" (causal, what is deployed) or "topk" (the paper's, training only).
        importance: the measure of a token's importance, a row of `IMPORTANCE`.

    Raises:
        ConfigError: a value that does not exist or is out of range.
    """

    weight_bits: int = 4
    embedding_bits: int = 8
    activation_bits: Bits = ADAPTIVE
    site_bits: dict[str, Bits] = field(default_factory=dict)
    hadamard: bool = False
    method: str = "lsq"
    init: str = "mse"
    ratio: float = 0.5
    policy: str = "threshold"
    importance: str = "value_peak"
    quant_method: str = "squat"  # type: ignore[assignment]  # an enum of transformers' own methods

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits, adaptive=False)
        _check_bits("embedding_bits", self.embedding_bits, adaptive=False)
        _check_bits("activation_bits", self.activation_bits, adaptive=True)
        for site, bits in self.site_bits.items():
            _check_row("site_bits", site, SITES)
            _check_bits(f"site_bits.{site}", bits, adaptive=SITES[site].follows is not None)
        if not isinstance(self.hadamard, bool):
            raise ConfigError(f"hadamard: {self.hadamard!r} is neither true nor false")
        method_of(self.method)
        _check_row("init", self.init, INITIAL_STEPS)
        _check_row("policy", self.policy, POLICIES)
        _check_row("importance", self.importance, IMPORTANCE)
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio: {self.ratio!r} is no fraction of tokens; choose 0 to 1")
        if self.quant_method != "squat":
            raise ConfigError(f"quant_method: {self.quant_method!r} is not 'squat'")

    def bits_of(self, site: str, layer: int = 1) -> Bits:
        """Bits of a site in a layer.

        In layer 0 nothing has been attended to yet: a "4:8" site that follows the previous layer's
        importance has 8 bits there.
        """
        row = SITES[site]
        bits = self.site_bits.get(site, row.bits if row.bits is not None else self.activation_bits)
        return 8 if bits == ADAPTIVE and layer == 0 and row.follows == "previous" else bits

    def transforms(self, site: str) -> bool:
        """Whether a site's tensor is transformed before it is quantized."""
        return self.hadamard and site == "mlp_mid"

    @property
    def token_adaptive(self) -> bool:
        """Whether any site chooses bits by token."""
        return any(self.bits_of(site) == ADAPTIVE for site in SITES)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.json."""
        return asdict(self)
