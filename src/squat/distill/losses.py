"""The losses of quantization-aware distillation, one function each (paper IV-B and IV-D).

    L = (1 - gamma) * CE + gamma * tau^2 * KL(teacher || student)  +  r_E * L_E  +  r_D * L_D

Every term is a mean over tokens, or over layers and heads: none grows with the batch or the sequence.
Where a batch is spread over processes, every term is that of the whole batch (module `replicas`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from squat import replicas

_AT_ONCE = 1 << 21
"""Logits whose loss is computed at once: few megabytes, and enough work for a GPU."""


class LossConfig(BaseModel):
    """Weights of the loss terms; the defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    gamma: float = Field(0.5, ge=0, le=1, description="share of the distillation term against CE")
    temperature: float = Field(2.0, gt=0, description="tau, softens teacher and student")
    top_k: int | None = Field(
        None, ge=2, description="distil the teacher's most probable entries only; default: all"
    )
    entropy: float = Field(0.5, ge=0, description="r_E, weight of the entropy loss")
    distribution: float = Field(1.0, ge=0, description="r_D, weight of the attention-map loss")
    published_sign: bool = Field(
        False, description="add log(cosine) as the paper prints it, which pushes the maps apart"
    )


class _SumOfTokens(torch.autograd.Function):
    """A loss summed over tokens, some of them at a time, and its gradient with it.

    With tens of thousands of entries in a vocabulary, logits are the largest tensors of a step. Nothing of
    a loss is left here until the backward pass but the gradient, in the logits' own precision.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss_of: Callable[[Tensor, slice], Tensor]) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), device=logits.device)
        step = max(1, _AT_ONCE // logits.shape[1])
        for begin in range(0, logits.shape[0], step):
            rows = slice(begin, begin + step)
            with torch.enable_grad():
                some = logits[rows].detach().float().requires_grad_(wanted)
                loss = loss_of(some, rows)
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(loss, some)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats.

    Args:
        logits: [tokens, vocabulary]; labels: [tokens], -100 where nothing is to be predicted.
    """

    def of(some: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(some, labels[rows], reduction="sum")

    return _SumOfTokens.apply(logits, of) / (labels != -100).sum()


def distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    counted: Tensor,
    top_k: int | None = None,
) -> Tensor:
    """tau^2 * KL(teacher || student), averaged per token.

    The authors' script sums over the sequence, so that this term weighs sequence-length times more than
    the formula says; here it is the formula.

    Args:
        student, teacher: logits [tokens, vocabulary].
        counted: bool [tokens], False for padding.
        top_k: both are distributions over the teacher's so many most probable entries, as if there were no
            others (OSTQuant, arXiv 2501.13987, "KL-top"); default: all.
    """

    def of(some: Tensor, rows: slice) -> Tensor:
        wanted = teacher[rows].float()
        if top_k is not None:
            wanted, ids = wanted.topk(min(top_k, wanted.shape[1]))
            some = some.gather(1, ids)
        log_p = F.log_softmax(wanted / temperature, dim=-1)
        log_q = F.log_softmax(some / temperature, dim=-1)
        per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
        return (per_token * counted[rows]).sum()

    return temperature**2 * _SumOfTokens.apply(student, of) / counted.sum()


def distillation_from_draws(
    student: Tensor, draws: Tensor, temperature: float, counted: Tensor
) -> Tensor:
    """tau^2 * KL(frequencies || student), averaged per token; see module `teacher_cache`.

    Args:
        student: logits [tokens, vocabulary].
        draws: ids [tokens, draws] from the teacher's distribution at this temperature.
        counted: bool [tokens], False for padding.
    """

    def of(some: Tensor, rows: slice) -> Tensor:
        ids = draws[rows]
        frequency = (ids[:, :, None] == ids[:, None, :]).sum(dim=-1) / ids.shape[1]
        log_q = F.log_softmax(some / temperature, dim=-1)
        per_token = (frequency.log() - log_q.gather(1, ids)).mean(dim=-1)
        return (per_token * counted[rows]).sum()

    return temperature**2 * _SumOfTokens.apply(student, of) / counted.sum()


def entropy(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """L_E = -log( sum over layers and heads of log(1 + var(q) * var(k)) ).

    The entropy of a Gaussian grows with its variance: queries and keys that fill their few codes carry
    more information. (The authors' code adds log(1 + var q) + log(1 + var k) instead of the product.)

    Args:
        queries: per layer, quantized, [batch, heads, tokens, head size].
        keys: per layer, quantized, [batch, key heads, tokens, head size].
    """
    total = queries[0].new_zeros((), dtype=torch.float32)
    for query, key in zip(queries, keys, strict=True):
        groups = query.shape[1] // key.shape[1]
        total = (
            total + torch.log1p(_variance(query) * _variance(key).repeat_interleave(groups)).sum()
        )
    return -total.log()


def _variance(x: Tensor) -> Tensor:
    """The variance by head, over the whole batch: [batch, heads, tokens, head size] to [heads]."""
    x = x.float()
    if replicas.count() == 1:
        return x.var(dim=(0, 2, 3))
    mean = replicas.mean(x.mean(dim=(0, 2, 3)))
    square = replicas.mean((x - mean[:, None, None]).square().mean(dim=(0, 2, 3)))
    values = x[:, 0].numel() * replicas.count()
    return square * (values / (values - 1))


def distribution(student: list[Tensor], teacher: list[Tensor], published_sign: bool) -> Tensor:
    """L_D = -log(mean cosine similarity of the attention maps), over layers, sequences and heads.

    Minimised, this brings the quantized maps towards the full-precision ones. The paper's eq. 13 adds
    +log(sum of cosines) to a loss that is minimised, which does the opposite; `published_sign` computes
    that, for the ablation.

    Args:
        student, teacher: per layer, softmax probabilities [batch, heads, tokens, keys].
    """
    cosines = [
        F.cosine_similarity(s.float().flatten(2), t.float().flatten(2), dim=-1)
        for s, t in zip(student, teacher, strict=True)
    ]
    if published_sign:
        return replicas.mean(torch.stack([c.mean(dim=0).sum() for c in cosines]).sum()).log()
    return -replicas.mean(torch.stack([c.mean() for c in cosines]).mean()).log()
