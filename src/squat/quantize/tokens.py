"""Token-adaptive bits: how important is a token, and who gets 8 bits (paper IV-C).

The importance of token i comes from its attention to the first token, averaged over heads. A policy
then gives the most important fraction `ratio` of the tokens 8 bits and the others 4:

* `topk` is the paper's: it ranks the tokens of a sequence, so that a token's bits depend on tokens after
  it. It cannot be deployed; it is here to train and compare as the paper does.
* `threshold` compares each token with a number that training has learned, the running
  (1 - ratio) quantile of the importance. It decides once, when the token arrives: prefill, chunked
  prefill and decoding give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Importance = Callable[[Tensor, Tensor], Tensor]


def first_token(attention: Tensor, visible: Tensor) -> Tensor:
    """The published importance: the attention probability to the first token, averaged over heads.

    Args:
        attention: [batch, heads, tokens], each token's attention to the first one.
        visible: [batch, tokens], the number of keys that each token sees.
    """
    return attention.mean(dim=1)


def relative_first_token(attention: Tensor, visible: Tensor) -> Tensor:
    """Attention to the first token relative to uniform attention, 1 / visible.

    The published importance falls with the position whatever the token says; this one can be compared
    across positions, as a fixed threshold must.
    """
    return first_token(attention, visible) * visible


IMPORTANCE: dict[str, Importance] = {
    "first_token": first_token,
    "relative_first_token": relative_first_token,
}


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
        ordered = importance[real].sort().values
        narrow = round(len(ordered) * (1 - self.ratio))
        if self.ratio == 1:
            quantile = ordered.new_tensor(-torch.inf)
        else:
            quantile = ordered[narrow] if narrow < len(ordered) else ordered.new_tensor(torch.inf)
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
