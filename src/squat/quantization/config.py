"""What to quantize and to how many bits: `SquatConfig`, checked once, when it is made.

The config is what stands as `quantization_config` in a checkpoint's config.json, what a recipe's
`quantize:` section holds and what the exporter reads: one description for training and deployment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from squat.errors import ConfigError
from squat.quantization.hadamard import power_of_two_in
from squat.quantization.levels import WEIGHT_LEVELS
from squat.quantization.quantizers import INITIAL_STEPS, method_of
from squat.quantization.tokens import IMPORTANCE, POLICIES, RANKS_TOKENS

ADAPTIVE: Final = "4:8"
"""A site whose tokens have 8 or 4 bits each, by the token's importance."""

FLOAT = 32
"""Bits that mean: leave it in floating point (for studies; such a model cannot be exported)."""

MAX_RECENT = 64
"""Of `recent_keys`; the engine has room for as many."""

Bits = int | Literal["4:8"]


@dataclass(frozen=True)
class Site:
    """A tensor of the graph that is quantized (the sites are defined in docs/format.md).

    `follows`: which layer's importance gives a token its width at this site, or None where the width
    never depends on the token. `bits`: the site's own bits; None: the config's `activation_bits`.
    `exponents`: whether a token may raise its step by a power of two, if that is all that it may; not where
    the product's sum runs over tokens. `levels`: whether 4-bit codes may stand for levels.
    `hadamard`: whether it can be transformed (at k, queries are transformed alike).
    """

    follows: Literal["previous", "current"] | None
    bits: int | None = None
    signed: bool = True
    exponents: bool = True
    levels: bool = True
    hadamard: bool = True


SITES: dict[str, Site] = {
    "attn_in": Site("previous"),
    "q": Site("previous", hadamard=False),
    "k": Site("previous"),
    "probs": Site(None, bits=8, signed=False, exponents=False, levels=False, hadamard=False),
    "v": Site("current", exponents=False, hadamard=False),
    "attn_out": Site("current"),
    "mlp_in": Site("current"),
    "mlp_mid": Site("current"),
    "head_in": Site(None, bits=8, levels=False),
}

HADAMARD_SITES = tuple(name for name, site in SITES.items() if site.hadamard)
WEIGHT_STEPS = ("row", "tensor")
TOKEN_STEPS = ("peak", "exponent", "static")
SOFTMAX = ("base2", "natural")
ACTIVATION_LEVELS = ("uniform", "table")


def _check_bits(name: str, bits: Any, adaptive: bool) -> None:
    if bits == ADAPTIVE and adaptive:
        return
    if isinstance(bits, int) and not isinstance(bits, bool) and (2 <= bits <= 8 or bits == FLOAT):
        return
    choices = (
        "2 to 8" + (f', "{ADAPTIVE}"' if adaptive else "") + f", or {FLOAT} to leave it in float"
    )
    raise ConfigError(f"{name}: {bits!r} bits are not possible; choose {choices}")


def _check_row(name: str, value: str, table: Iterable[str]) -> None:
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
        weight_steps: "row": a step for each output row of a weight, embeddings included; "tensor": one for
            each matrix, as in the paper.
        weight_levels: what 4-bit codes of weights stand for: "iq4_nl", 16 levels that are dense where weights
            are many, a type of GGUF that other programs read; or "uniform" steps, as in the paper.
        token_steps: "peak": every token's steps follow its largest magnitude, in quarters of an octave;
            "exponent": it may raise them by powers of two; "static": the same for every token, as in the
            paper.
        softmax: "base2": probabilities become codes as powers of two, and are divided by their sum behind the
            product with values; "natural": they are divided first and then quantized with the step of their
            site, as in the paper.
        activation_levels: what 4-bit activation codes stand for: "uniform" steps, or a "table" of 16 levels
            that calibration fits to each site.
        hadamard: sites that are transformed by Hadamard matrices, and their weights by the inverse: outliers
            are spread over many elements, each of which needs fewer bits. At attn_out it costs nothing when
            the model runs: the value's weights take it in.
        reflections: whether the blocks of such a transform, where a size has several, are mixed, too, and the
            heads at attn_out, which costs little when the model runs.
        channel_scales: whether what matrices read is first brought into balance with them, channel by channel
            (module `scales`). It costs nothing when the model runs.
        key_centers: whether transformed keys of less than 8 bits are quantized as differences from their
            mean, head by head, which no attention notices (docs/format.md).
        wide_first_token: whether the first token of a text has 8 bits wherever tokens may have 4.
        recent_keys: of how many tokens, itself and those just before it, a token sees the keys in 8 bits
            where they have 4 for later ones; with `token_steps` "peak".
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
    weight_steps: str = "row"
    weight_levels: str = "iq4_nl"
    token_steps: str = "peak"
    softmax: str = "base2"
    activation_levels: str = "table"
    hadamard: Sequence[str] = HADAMARD_SITES
    reflections: bool = True
    channel_scales: bool = True
    key_centers: bool = True
    wide_first_token: bool = True
    recent_keys: int = 16
    method: str = "lsq"
    init: str = "mse"
    ratio: float = 0.5
    policy: str = "threshold"
    importance: str = "rarity"
    quant_method: str = "squat"  # type: ignore[assignment]  # an enum of transformers' own methods

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits, adaptive=False)
        _check_bits("embedding_bits", self.embedding_bits, adaptive=False)
        _check_bits("activation_bits", self.activation_bits, adaptive=True)
        for site, bits in self.site_bits.items():
            _check_row("site_bits", site, SITES)
            _check_bits(f"site_bits.{site}", bits, adaptive=SITES[site].follows is not None)
        _check_row("weight_steps", self.weight_steps, WEIGHT_STEPS)
        _check_row("weight_levels", self.weight_levels, WEIGHT_LEVELS)
        _check_row("token_steps", self.token_steps, TOKEN_STEPS)
        _check_row("softmax", self.softmax, SOFTMAX)
        _check_row("activation_levels", self.activation_levels, ACTIVATION_LEVELS)
        if not isinstance(self.hadamard, (list, tuple)):
            raise ConfigError(
                f"hadamard: {self.hadamard!r} is no list of sites; choose some of "
                + ", ".join(HADAMARD_SITES)
            )
        for site in self.hadamard:
            _check_row("hadamard", site, HADAMARD_SITES)
        self.hadamard = [site for site in HADAMARD_SITES if site in self.hadamard]
        for name in ("reflections", "channel_scales", "key_centers", "wide_first_token"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is neither true nor false")
        recent = self.recent_keys
        if not isinstance(recent, int) or isinstance(recent, bool) or not 0 <= recent <= MAX_RECENT:
            raise ConfigError(
                f"recent_keys: {recent!r} is no number of tokens; choose 0 to {MAX_RECENT}"
            )
        method_of(self.method)
        _check_row("init", self.init, INITIAL_STEPS)
        _check_row("policy", self.policy, POLICIES)
        _check_row("importance", self.importance, IMPORTANCE)
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio: {self.ratio!r} is no fraction of tokens; choose 0 to 1")
        if self.quant_method != "squat":
            raise ConfigError(f"quant_method: {self.quant_method!r} is not 'squat'")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> SquatConfig:
        """What a checkpoint's config.json says; what an older one does not speak of it does not have."""
        before = {
            "weight_levels": "uniform",
            "token_steps": "exponent",
            "softmax": "natural",
            "reflections": False,
            "channel_scales": False,
            "key_centers": False,
            "wide_first_token": False,
            "recent_keys": 0,
        }
        return super().from_dict(before | config_dict, *args, **kwargs)

    def bits_of(self, site: str, layer: int = 1, first: int = 0) -> Bits:
        """Bits of a site in a layer of a model whose layer `first` is the first one with attention.

        Before it nothing has been attended to: a "4:8" site has 8 bits in the layers in front of it, and in
        itself, if it follows the previous layer's importance.
        """
        row = SITES[site]
        bits = self.site_bits.get(site, row.bits if row.bits is not None else self.activation_bits)
        return 8 if bits == ADAPTIVE and layer < first + (row.follows == "previous") else bits

    def widths_of(self, site: str, layer: int = 1, first: int = 0) -> tuple[int, ...]:
        """The bits that tokens have a step for at a site of a layer, see `bits_of`: none, one, or 8 and 4."""
        if self.row_codes_of(site) is not None:
            return ()
        bits = self.bits_of(site, layer, first)
        if bits == ADAPTIVE or self.widens_first(site) or self.recent_of(site, layer, first):
            return (8, 4)
        return () if bits == FLOAT else (int(bits),)

    def widens_first(self, site: str) -> bool:
        """Whether the first token of a text is wide at a site whose other tokens are not."""
        return self.wide_first_token and SITES[site].follows is not None and self.bits_of(site) == 4

    def recent_of(self, site: str, layer: int = 1, first: int = 0) -> int:
        """Of how many tokens one sees a site in 8 bits that may have 4; see `bits_of`, `recent_keys`."""
        narrow = self.bits_of(site, layer, first) in (ADAPTIVE, 4)
        return self.recent_keys if site == "k" and narrow and self.token_steps == "peak" else 0

    def block_of(self, site: str, size: int) -> int:
        """How many of a site's elements are transformed together when the model runs; 1: none are."""
        if site not in self.hadamard:
            return 1
        if self.reflections:
            return size
        return 1 if site == "attn_out" else power_of_two_in(size)

    def centers_keys(self, layer: int, first: int) -> bool:
        """Whether a layer's keys are quantized as differences from their mean; see `bits_of`.

        Other programs refuse a tensor that they do not know: a file without transforms is for them, too.
        """
        narrow = self.bits_of("k", layer, first) in (ADAPTIVE, *range(8))
        return self.key_centers and narrow and "k" in self.hadamard

    def row_codes_of(self, site: str) -> int | None:
        """The code of the largest element of every row of a site; None where steps are learned."""
        bits = self.bits_of(site)
        if site != "probs" or self.softmax != "base2" or bits == FLOAT:
            return None
        return (1 << int(bits)) - 1

    def token_steps_of(self, site: str) -> str:
        """Where a token's step at a site comes from, a row of `TOKEN_STEPS`."""
        raised = self.token_steps == "exponent" and not SITES[site].exponents
        return "static" if raised else self.token_steps

    def has_levels(self, site: str) -> bool:
        """Whether a site's 4-bit codes stand for levels."""
        return self.activation_levels == "table" and SITES[site].levels

    @property
    def token_adaptive(self) -> bool:
        """Whether any site chooses bits by token."""
        return any(self.bits_of(site) == ADAPTIVE for site in SITES)

    @property
    def ranks_tokens(self) -> bool:
        """Whether a token's bits depend on its rank in the vocabulary."""
        return self.token_adaptive and self.importance in RANKS_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.json."""
        return asdict(self)
