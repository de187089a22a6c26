"""Token-adaptive bits: how important is a token, and who gets 8 bits (paper IV-C).

In the paper the importance of token i is its attention to the first token, averaged over heads; there are
others (`IMPORTANCE`). A policy then gives the most important fraction `ratio` of the tokens 8 bits and the
others 4:

* `topk` is the paper's: it ranks the tokens of a sequence, so that a token's bits depend on tokens after
  it. It cannot be deployed; it is here to train and compare as the paper does.
* `threshold` compares each token with a number that training has learned, the running
  (1 - ratio) quantile of the importance. It decides once, when the token arrives: prefill, chunked
  prefill and decoding give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from squat import replicas


@dataclass(frozen=True)
class Arrival:
    """What a layer knows of its new tokens when it decides their widths, and what importance may look at.

    probs: [batch, heads, tokens, keys], the softmax before its quantization; scores: the same before mask
    and softmax.
    value: [batch, key heads, tokens, head size], the tokens' own values before their quantization.
    first: [batch, tokens], the first key that each token sees.
    visible: [batch, tokens], the number of keys that each token sees; its position is one less.
    ranks: [batch, tokens], how many tokens of the vocabulary are met more often than each token; None
        unless `RANKS_TOKENS` asks for it.
    """

    probs: Tensor
    scores: Tensor
    value: Tensor
    first: Tensor
    visible: Tensor
    ranks: Tensor | None = None

    def to_first(self, attention: Tensor) -> Tensor:
        """Of [batch, heads, tokens, keys] what is for the first key, averaged over heads: [batch, tokens]."""
        index = self.first[:, None, :, None].expand(*attention.shape[:3], 1)
        return attention.gather(3, index).squeeze(3).mean(dim=1)


Importance = Callable[[Arrival], Tensor]
"""Of an arrival, each token's importance [batch, tokens]: of what came before the token, and of itself."""


def first_token(arrival: Arrival) -> Tensor:
    """The published importance: the attention probability to the first token, averaged over heads."""
    return arrival.to_first(arrival.probs)


def relative_first_token(arrival: Arrival) -> Tensor:
    """Attention to the first token relative to uniform attention, 1 / visible.

    The published importance falls with the position whatever the token says; this one can be compared
    across positions, as a fixed threshold must.
    """
    return first_token(arrival) * arrival.visible


def first_token_score(arrival: Arrival) -> Tensor:
    """The authors' code: the score q * k / sqrt(d) of the first token, before the softmax."""
    return arrival.to_first(arrival.scores)


def value_peak(arrival: Arrival) -> Tensor:
    """The outlier of the token's own value: its largest square relative to its mean square.

    An outlier is what a few codes cannot hold beside everything else. Attention is not asked.
    """
    value = arrival.value.float().transpose(1, 2).flatten(2)
    mean_square = value.double().square().mean(dim=-1).float()
    return value.abs().amax(dim=-1).square() / (mean_square + 1e-30)


def rarity(arrival: Arrival) -> Tensor:
    """How seldom the token is: its rank in the vocabulary, by how often it stood in the text of calibration.

    The same in every layer, and known before the first.
    """
    assert arrival.ranks is not None
    return arrival.ranks.float()


def scattered(arrival: Arrival) -> Tensor:
    """A control: tokens at arbitrary places, the same in every text. Multiples of the golden ratio, mod 1,
    spread any share of the tokens evenly."""
    return (arrival.visible - 1) * 0.6180339887498949 % 1.0


def earliest(arrival: Arrival) -> Tensor:
    """A control: the first tokens of the text."""
    return -arrival.visible.float()


IMPORTANCE: dict[str, Importance] = {
    "first_token": first_token,
    "relative_first_token": relative_first_token,
    "first_token_score": first_token_score,
    "value_peak": value_peak,
    "rarity": rarity,
    "scattered": scattered,
    "earliest": earliest,
}


RANKS_TOKENS = ("rarity",)
"""Of these, the ones that look at `Arrival.ranks`."""


class TopKPolicy(nn.Module):
    """The paper's policy: the most important round-up(ratio * tokens) of each sequence get 8 bits.

    Ranks within one sequence, never across the batch; padding neither counts nor is counted. Given one
    token at a time, as in decoding, it always answers 8 bits.
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, importance: Tensor, real: Tensor) -> Tensor:
        """Whether each token gets 8 bits: bool [batch, tokens].

        Args:
            importance: [batch, tokens].
            real: bool [batch, tokens], False for padding.
        """
        narrow = (real.sum(dim=1, keepdim=True) * (1 - self.ratio)).long()
        ascending = importance.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
        rank = ascending.argsort(dim=1)
        return rank >= narrow


class ThresholdPolicy(nn.Module):
    """Causal: a token gets 8 bits if its importance reaches the layer's threshold.

    In training mode a forward pass remembers what it saw, and `follow` then moves the threshold towards
    the (1 - ratio) quantile of it: an exponential moving average. In between the threshold stands still, so
    that gradient checkpointing, which computes a layer twice, decides twice the same. In eval mode the
    threshold is frozen. It is saved with the model.
    """

    momentum = 0.95

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.threshold: Tensor
        self.register_buffer("threshold", torch.full((1,), torch.nan))
        self.seen: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def follow(self) -> None:
        """Move the threshold towards the quantile of the last batch seen; the first one sets it."""
        if self.seen is None:
            return
        importance, real = self.seen
        self.seen = None
        # Padding is sorted to the end; indexed by a tensor, so that no accelerator is waited for.
        ordered = (
            replicas.gathered(importance.masked_fill(~real, torch.inf).flatten()).sort().values
        )
        ordered = torch.cat([ordered, ordered.new_full((1,), torch.inf)])
        narrow = ((ordered < torch.inf).sum() * (1 - self.ratio)).round().long()
        quantile = ordered.index_select(0, narrow.reshape(1))
        if self.ratio == 1:
            quantile = torch.full_like(quantile, -torch.inf)
        moved = self.momentum * self.threshold + (1 - self.momentum) * quantile
        self.threshold.copy_(torch.where(self.threshold.isfinite(), moved, quantile))

    def forward(self, importance: Tensor, real: Tensor) -> Tensor:
        """Whether each token gets 8 bits: bool [batch, tokens]; arguments as in TopKPolicy."""
        if self.training:
            self.seen = importance.detach(), real
        return importance >= self.threshold


def follow_importance(model: nn.Module) -> None:
    """After a training step's backward pass: let every threshold of a model follow what it saw."""
    for module in model.modules():
        if isinstance(module, ThresholdPolicy):
            module.follow()


POLICIES: dict[str, type[TopKPolicy] | type[ThresholdPolicy]] = {
    "topk": TopKPolicy,
    "threshold": ThresholdPolicy,
}
