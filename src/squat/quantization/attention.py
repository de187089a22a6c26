"""Attention with quantized operands, as an attention function of transformers.

Every decoder of transformers 5 reaches its attention through one interface; registering a function there
gives access to query, key (after RoPE), probabilities and value of any architecture. This one quantizes
the four, measures each token's importance on the way, and asks the policy for the tokens' widths.

Most attention goes to the tokens just before, where an error in a score costs most: of keys that have 4 bits
the last ones are multiplied in 8 (`recent_keys`), each for the tokens that come soon after it.

Two operands have two different times: q and k are quantized at the width that the *previous* layer gave a
token, v at the width that *this* layer gives it, which is known only after the softmax.

With a KV cache the function receives past keys and values unquantized. What the past tokens' widths were
is remembered in the cache itself, in extra layers behind the model's own, so that whatever transformers
does to a cache (reorder it for beams, crop it) happens to the widths as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import eager_mask

from squat.errors import ConfigError
from squat.exact import exact_product, is_exact, octaves, powers_of_two
from squat.exact import softmax as exact_softmax
from squat.quantization.modules import SiteQuantizer
from squat.quantization.products import full_precision
from squat.quantization.tokens import IMPORTANCE, Arrival, ThresholdPolicy, TopKPolicy

IMPLEMENTATION = "squat"
"""The name under which the function is registered: `attn_implementation="squat"`."""


@dataclass
class AttentionTap:
    """What a layer's attention computed with, for losses and reports.

    query: [batch, heads, tokens, head size] and key: [batch, key heads, keys, head size], quantized;
    probs: [batch, heads, tokens, keys], the softmax before its quantization.
    """

    query: Tensor
    key: Tensor
    probs: Tensor


@dataclass
class TokenState:
    """What layers tell each other in one forward pass; one object, shared by a model's layers.

    wide: per layer, bool [batch, tokens]: the width that the layer gave each new token.
    first: bool [batch, tokens]: which of them begin a text, where these are always wide.
    ranks: [batch, tokens]: their ranks in the vocabulary, if importance asks for them.
    real: bool [batch, tokens]: which of the new tokens are no padding.
    taps: per layer, filled while `record` is on; whoever reads it clears it.
    """

    wide: dict[int, Tensor] = field(default_factory=dict)
    first: Tensor | None = None
    ranks: Tensor | None = None
    real: Tensor | None = None
    record: bool = False
    taps: dict[int, AttentionTap] = field(default_factory=dict)

    def width_for(self, site: SiteQuantizer) -> Tensor | None:
        """Bool [batch, tokens]: which new tokens are wide at this site; None if it does not ask."""
        if not site.adaptive:
            return None
        if site.first_alone:
            return self.first
        return self.wide[site.layer - (site.follows == "previous")]

    def realised_share(self) -> Tensor:
        """The fraction of real tokens that got 8 bits in the last forward pass: [layers]."""
        assert self.real is not None
        wide = torch.stack([wide for _, wide in sorted(self.wide.items())])
        return (wide & self.real).sum(dim=(1, 2)) / self.real.sum()


class AttentionSites(nn.Module):
    """The quantizers, the policy and the memory of one layer's attention."""

    def __init__(
        self,
        sites: dict[str, SiteQuantizer],
        policy: TopKPolicy | ThresholdPolicy | None,
        importance: str,
        state: TokenState,
        layer: int,
        layers: int,
        rotated: int,
    ) -> None:
        super().__init__()
        self.sites = nn.ModuleDict(sites)
        self.rotated = rotated
        self.policy = policy
        self.importance = importance
        self.state = state
        self.layer, self.layers = layer, layers
        self.cache: Cache | None = None  # lives from the hook before an attention to its end

    def arranged(self, x: Tensor) -> Tensor:
        """Queries or keys [..., head size] as the engine has them: pairs that are rotated are neighbours.

        Products do not depend on it, but the last bits of a transform and the place of a center do.
        """
        keys = self.sites["k"]
        if not self.rotated or (keys.block == 1 and keys.center is None):
            return x
        pairs = x[..., : self.rotated].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat((pairs, x[..., self.rotated :]), dim=-1)

    @property
    def remembers(self) -> bool:
        """Whether keys or values have two widths."""
        return any(self.sites[name].adaptive for name in ("k", "v"))

    def past_widths(self, key: Tensor, new: int) -> tuple[Tensor | None, Tensor | None]:
        """Widths of k and of v for the tokens before this call: bool [batch, past] each, or None."""
        past = key.shape[2] - new
        if past == 0 or not self.remembers:
            return None, None
        memory = self._memory()
        known = None if memory is None else memory.keys
        if memory is None or known is None or known.shape[2] != past:
            raise ConfigError(
                f"activation_bits: token-adaptive bits need a cache that grows with the text (DynamicCache); "
                f"this one holds {past} past tokens whose widths are not known"
            )
        assert memory.values is not None
        return known[:, 0, :, 0], memory.values[:, 0, :, 0]

    def remember(self, k_wide: Tensor | None, v_wide: Tensor | None) -> None:
        """Keep the new tokens' widths, bool [batch, tokens], beside their keys and values; None: all wide."""
        memory = self._memory() if self.remembers else None
        if memory is not None:
            known = k_wide if v_wide is None else v_wide
            assert known is not None
            widths = (torch.ones_like(known) if wide is None else wide for wide in (k_wide, v_wide))
            memory.update(*(wide[:, None, :, None] for wide in widths))

    def _memory(self) -> DynamicLayer | None:
        if self.cache is None:
            return None
        index, layers = self.layers + self.layer, self.cache.layers
        while len(layers) <= index:
            # Negative: a layer of the model, yet to be filled.
            remembers_for = len(layers) - self.layers
            layers.append(
                _forgets_like(layers[remembers_for]) if remembers_for >= 0 else DynamicLayer()
            )
        memory = layers[index]
        assert isinstance(memory, DynamicLayer)
        return memory


def _forgets_like(layer: Any) -> DynamicLayer:
    """An empty cache layer that keeps as many past tokens as `layer` does."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return DynamicSlidingWindowLayer(layer.sliding_window)
    return DynamicLayer()


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Grouped-query attention: [batch, key heads, ...] to [batch, key heads * groups, ...]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _joined(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], dim=1)


def _is_recent(scores: Tensor, recent: int) -> Tensor:
    """Of scores [..., tokens, keys], whose tokens are the last ones: bool [tokens, keys]."""
    tokens, keys = scores.shape[-2:]
    positions = torch.arange(keys, device=scores.device)
    return positions[keys - tokens :, None] - positions < recent


def squat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with q, k, probabilities and v quantized.

    Args:
        module: the attention module; `module.squat` holds its AttentionSites.
        query: [batch, heads, tokens, head size]; key, value: [batch, key heads, keys, head size].
        attention_mask: [batch or 1, 1, tokens, keys], 0 where a token sees a key, hugely negative elsewhere.

    Returns:
        The output [batch, tokens, heads, head size] and the unquantized probabilities
        [batch, heads, tokens, keys].
    """
    squat: AttentionSites = module.squat  # type: ignore[assignment]
    state, sites = squat.state, squat.sites
    batch, heads, tokens = query.shape[:3]
    groups = heads // key.shape[1]
    past_k, past_v = squat.past_widths(key, tokens)

    def widths(site: str, past: Tensor | None = None) -> Tensor | None:
        new = state.width_for(sites[site])  # type: ignore[arg-type]
        return None if new is None else _joined(past, new)[:, None, :, None]

    query = sites["q"](squat.arranged(query), widths("q"))
    keys: SiteQuantizer = sites["k"]  # type: ignore[assignment]
    arranged = squat.arranged(key)
    key = keys(arranged, widths("k", past_k))
    exact = is_exact(module)
    of_probs: SiteQuantizer = sites["probs"]  # type: ignore[assignment]
    product = exact_product if exact else torch.matmul
    with full_precision(query):
        products = product(query, _repeat_heads(key, groups).transpose(2, 3)).float()
        if keys.recent:
            wide = keys(arranged, torch.ones((), dtype=torch.bool, device=key.device))
            of_wide = product(query, _repeat_heads(wide, groups).transpose(2, 3)).float()
            products = torch.where(_is_recent(products, keys.recent), of_wide, products)
    scores, total = products * scaling, None
    if not exact:
        probs = weights = torch.softmax(scores + attention_mask, dim=-1)
    elif not of_probs.makes_codes:
        probs = weights = exact_softmax(scores + attention_mask)
    else:
        weights, total = powers_of_two(products * octaves(scaling) + attention_mask)
        probs = weights / total

    if squat.policy is not None:
        visible = (attention_mask == 0)[:, 0].expand(batch, -1, -1)  # [batch, tokens, keys]
        arrival = Arrival(
            probs.detach(),
            scores.detach(),
            value[:, :, -tokens:].detach(),
            # The first key that a token sees: behind left padding or in a sliding window not key 0.
            visible.int().argmax(dim=-1),
            visible.sum(dim=-1),
            state.ranks,
        )
        importance = IMPORTANCE[squat.importance](arrival)
        state.real = visible.any(dim=1)[:, -tokens:]
        wide = squat.policy(importance, state.real)
        state.wide[squat.layer] = wide if state.first is None else wide | state.first
    values: SiteQuantizer = sites["v"]  # type: ignore[assignment]
    squat.remember(state.width_for(sites["k"]), state.width_for(values))  # type: ignore[arg-type]
    squat.cache = None

    if state.record:
        state.taps[squat.layer] = AttentionTap(query, key, probs)
    multiplier = values.multiplier(value)
    value = values(value, widths("v", past_v))
    if multiplier is not None:
        # A sum over tokens has no room for their steps: probabilities take them in.
        value = value / multiplier.to(value.dtype)
        weights = weights * _repeat_heads(multiplier, groups).transpose(2, 3)
    step = None
    if of_probs.makes_codes:
        weights, per_one = of_probs.row_codes(weights)
        step = 1.0 / (per_one if total is None else per_one * total)
        if not exact:
            weights, step = weights * step, None
    else:
        weights = of_probs(weights)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    weights, value = weights.to(value.dtype), _repeat_heads(value, groups)
    with full_precision(value):
        output = exact_product(weights, value, step) if exact else torch.matmul(weights, value)
    return output.transpose(1, 2).contiguous(), probs


AttentionInterface.register(IMPLEMENTATION, squat_attention)
# Without a mask function of the same name the function above would be given no mask: attention that is
# silently not causal.
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
