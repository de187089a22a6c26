"""Perplexity of a text that stands as one row of token ids.

The row is cut into adjacent windows, in the order of the text. Every token but the first of its
window is predicted from the tokens before it in the window. The loss is the mean over all predicted
tokens, so that a short last window weighs what it holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table

from squat.errors import DataError
from squat.evaluate.scorer import LogitsModel
from squat.terminal import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PerplexityResult:
    """Mean loss in nats per predicted token, its exponential, and how many tokens it counts."""

    loss: float
    perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def perplexity(
    model: "PreTrainedModel | LogitsModel",
    tokens: ArrayLike,
    sequence_length: int,
    batch_size: int = 16,
) -> PerplexityResult:
    """Perplexity of a Hugging Face model, or of anything with `logits(ids)` such as the engine.

    Args:
        model: a causal language model, or a `LogitsModel`, which takes one window at a time.
        tokens: token ids, one dimension; may be memory-mapped.
        sequence_length: tokens per window, 2 or more.
        batch_size: windows in one forward pass of a Hugging Face model.

    Raises:
        DataError: fewer than two tokens, windows that are shorter than that or longer than the
            model's context, or a token id outside its vocabulary.
    """
    if sequence_length < 2:
        raise DataError(
            f"sequence_length {sequence_length}: a window predicts nothing; give 2 or more"
        )
    row = np.asarray(tokens)
    windows = [row[i : i + sequence_length] for i in range(0, len(row) - 1, sequence_length)]
    if not windows:
        raise DataError(
            f"perplexity: {len(row)} tokens hold nothing to predict; give a longer text"
        )
    if isinstance(model, LogitsModel):
        total = _total_from_logits(model, windows)
    else:
        from squat.evaluate.huggingface import log_probabilities

        total = math.fsum(log_probabilities(model, windows, batch_size, "Perplexity"))
    predicted = sum(len(window) - 1 for window in windows)
    loss = -total / predicted
    return PerplexityResult(loss, float(np.exp(np.float64(loss))), predicted)


def _total_from_logits(model: LogitsModel, windows: Sequence[np.ndarray]) -> float:
    """Summed log-probability in nats; the log-softmax is in float64."""
    total = 0.0
    with track(windows, "Perplexity") as steps:
        for ids in steps:
            logits = np.asarray(model.logits(ids[:-1].tolist()), dtype=np.float64)
            logits = logits - logits.max(axis=-1, keepdims=True)
            predicted = np.take_along_axis(logits, ids[1:, None].astype(np.int64), axis=-1)
            total += float(predicted.sum() - np.log(np.exp(logits).sum(axis=-1)).sum())
    return total


def perplexity_table(results: Mapping[str, PerplexityResult]) -> Table:
    """One row a model, in the order given."""
    table = Table(title="Perplexity")
    table.add_column("model")
    for heading in ("loss (nats/token)", "perplexity", "tokens"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(name, f"{result.loss:.4f}", f"{result.perplexity:.2f}", f"{result.tokens:,}")
    return table
