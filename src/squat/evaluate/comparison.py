"""Models side by side: `squat compare A B ...`, checkpoints and .gguf files alike.

Size, speed, loss on a text and KL divergence to the first model on it, minimal pairs: what there is data for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from squat.checkpoints import load_model, load_tokenizer
from squat.data import check_tokenizer, tokenize_corpus
from squat.engine import Engine
from squat.errors import ConfigError
from squat.evaluate.huggingface import HuggingFaceScorer
from squat.evaluate.minimal_pairs import evaluate_minimal_pairs, read_minimal_pairs
from squat.evaluate.perplexity import perplexity
from squat.evaluate.scorer import Scorer
from squat.evaluate.speed import tokens_per_second
from squat.evaluate.tasks import engine_tokenizer, label_of
from squat.model_names import runs_in_engine
from squat.quantization.modules import QuantizedWeight
from squat.report.sections import Table
from squat.terminal import track


@dataclass
class Compared:
    """One model; None: not measured.

    bits: "W4A8"; megabytes: of a file, its size; of a folder, its weights at their bits, those in float at
    16. prefill, decode: tokens per second. loss: nats per token; kl: mean KL(first || this), nats.
    blimp: mean over the fields, with_supplement: and the supplement's tasks, all: over all paradigms, 0 to 1.
    """

    model: str
    runs_in: str
    bits: str
    megabytes: float
    prefill: float | None = None
    decode: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    blimp: float | None = None
    with_supplement: float | None = None
    all: float | None = None


class _Loaded:
    """A model of either kind, with what the comparison asks of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.network: PreTrainedModel | Engine
        if runs_in_engine(name):
            self.network = Engine(name)
            self.tokenizer = engine_tokenizer(self.network)
            self.vocabulary = self.network.info.vocab_size
            self.context = self.network.info.context
        else:
            self.network, self.tokenizer = load_model(name), load_tokenizer(name)
            self.vocabulary = self.network.config.vocab_size
            self.context = self.network.config.max_position_embeddings

    def describe(self) -> Compared:
        """Everything that needs no data."""
        if isinstance(self.network, Engine):
            size = self.network.info.file_bytes / 1e6
            return Compared(self.name, "engine", _bits_of_file(self.network), size)
        config = getattr(self.network.config, "quantization_config", None)
        bits = "float" if config is None else f"W{config.weight_bits}A{config.activation_bits}"
        return Compared(self.name, "PyTorch", bits, _weight_bytes(self.network) / 1e6)

    @torch.no_grad()
    def log_softmax(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Log-probabilities of every next token: [tokens, vocabulary]."""
        if isinstance(self.network, Engine):
            logits = torch.from_numpy(self.network.logits(ids))
        else:
            logits = self.network(torch.tensor([list(ids)]), use_cache=False).logits[0]
        values: NDArray[np.float64] = logits.double().log_softmax(-1).numpy()
        return values

    def scorer(self) -> Scorer:
        """For minimal pairs."""
        if isinstance(self.network, Engine):
            return self.network
        return HuggingFaceScorer(self.network, self.tokenizer)


def compare(
    models: Sequence[str],
    data: Path | None,
    pairs: Sequence[Path],
    limit: int | None,
    tokens: int | None,
    sequence_length: int,
    by_source: bool,
    speed: bool,
) -> list[Compared]:
    """Measure models; one result each, in the order given.

    Args:
        models: folders, Hub names and .gguf files.
        data: text for loss, perplexity, KL and speed; None: none of these.
        pairs: folders of minimal pairs; empty: none.
        limit: pairs per paradigm.
        tokens: how much of the text; None: all.
        sequence_length: of its windows.
        by_source: clean BabyLM's files by source.
        speed: whether to take the time, too.

    Raises:
        SquatError: fewer than two models, one that cannot be used, or data that cannot be read.
    """
    if len(models) < 2:
        raise ConfigError("models: a comparison needs two or more")
    loaded = [_Loaded(name) for name in models]
    results = [model.describe() for model in loaded]
    for result, label in zip(results, _labels(models), strict=True):
        result.model = label
    if data is not None:
        _measure_on_text(loaded, results, data, tokens, sequence_length, by_source, speed)
    if pairs:
        paradigms = read_minimal_pairs(*pairs, limit=limit)
        for model, result in zip(loaded, results, strict=True):
            found = evaluate_minimal_pairs(model.scorer(), paradigms)
            result.blimp = found.average_fields
            result.with_supplement = found.average_with_supplement
            result.all = found.average_paradigms
    return results


def _labels(models: Sequence[str]) -> list[str]:
    """Short names, where they tell the models apart."""
    short = [label_of(model) for model in models]
    return [
        name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)
    ]


def _measure_on_text(
    loaded: Sequence[_Loaded],
    results: Sequence[Compared],
    data: Path,
    tokens: int | None,
    sequence_length: int,
    by_source: bool,
    speed: bool,
) -> None:
    first = loaded[0]
    timed = min(128, *(model.context for model in loaded))
    rows = []
    for model in loaded:
        check_tokenizer(model.tokenizer, model.vocabulary)
        rows.append(tokenize_corpus(data, model.tokenizer, by_source=by_source)[:tokens])
    for model, result, row in zip(loaded, results, rows, strict=True):
        found = perplexity(model.network, row, sequence_length, batch_size=64)
        result.loss, result.perplexity = found.loss, found.perplexity
        if speed:
            ids = row[:timed].tolist()
            result.prefill, result.decode = tokens_per_second(model.network, ids)
    # KL needs the same tokens; models with another tokenizer are compared without it.
    alike = [
        (model, result)
        for model, result, row in zip(loaded, results, rows, strict=True)
        if model.vocabulary == first.vocabulary and np.array_equal(row, rows[0])
    ]
    ids = rows[0][: KL_TOKENS // sequence_length * sequence_length or sequence_length]
    windows = [ids[i : i + sequence_length].tolist() for i in range(0, len(ids), sequence_length)]
    sums = np.zeros(len(alike))
    with track(windows, "KL to the first") as steps:
        for window in steps:
            reference = first.log_softmax(window)
            for index, (model, _) in enumerate(alike):
                other = reference if model is first else model.log_softmax(window)
                sums[index] += (np.exp(reference) * (reference - other)).sum()
    for (_, result), total in zip(alike, sums, strict=True):
        result.kl = float(total / len(ids))


KL_TOKENS = 8192
"""How much of the text the KL divergence is measured on."""


def _weight_bytes(model: PreTrainedModel) -> float:
    """Quantized weights at their bits, everything else at 16; a tied weight counts once."""
    bits = {
        id(module.get_parameter("weight")): module.weight_quantizer.bits
        for module in model.modules()
        if isinstance(module, QuantizedWeight)
    }
    parameters: list[nn.Parameter] = list(model.parameters())
    return sum(p.numel() * bits.get(id(p), 16) for p in parameters) / 8


def _bits_of_file(engine: Engine) -> str:
    """Widths as the kernels name them: "a4 w4, a8 w8"."""
    return ", ".join(engine.info.kernels)


_MEASURES = {
    "megabytes": ("size, MB", "{:.2f}", 1),
    "prefill": ("prefill, tokens/s", "{:,.0f}", 1),
    "decode": ("decode, tokens/s", "{:,.0f}", 1),
    "loss": ("loss, nats", "{:.4f}", 1),
    "perplexity": ("perplexity", "{:.2f}", 1),
    "kl": ("KL to the first", "{:.4f}", 1),
    "blimp": ("BLiMP, fields, %", "{:.1f}", 100),
    "with_supplement": ("with supplement, %", "{:.1f}", 100),
    "all": ("all paradigms, %", "{:.1f}", 100),
}


def comparison_table(results: Sequence[Compared]) -> Table:
    """One column a model; the rows that any model has a value for."""

    def cells(measure: str, form: str, factor: float) -> list[str]:
        values = [getattr(result, measure) for result in results]
        return ["" if value is None else form.format(factor * value) for value in values]

    rows = [["runs in", *(r.runs_in for r in results)], ["bits", *(r.bits for r in results)]]
    for measure, (label, form, factor) in _MEASURES.items():
        if any(shown := cells(measure, form, factor)):
            rows.append([label, *shown])
    return Table("Models side by side", ["", *(result.model for result in results)], rows)


def to_json(results: Sequence[Compared]) -> list[dict[str, Any]]:
    """Plain numbers."""
    return [asdict(result) for result in results]


def to_csv(results: Sequence[Compared]) -> str:
    """The same, one line a model."""
    out = io.StringIO()
    table = csv.DictWriter(out, [f.name for f in fields(Compared)], lineterminator="\n")
    table.writeheader()
    table.writerows(to_json(results))
    return out.getvalue()
