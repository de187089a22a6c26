"""Studies: look into models and leave a section (tables, figures, numbers) in a folder.

`squat sensitivity`, `squat attention` and `squat compare` are the functions here behind a command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.checkpoints import load_model, load_tokenizer
from squat.data import check_tokenizer, tokenize_corpus
from squat.data.files import writing
from squat.data.tokenizer import first_token
from squat.errors import ConfigError, DataError
from squat.evaluate.comparison import compare, comparison_table, to_csv, to_json
from squat.evaluate.observation import Observation, entropy_bits, observe
from squat.evaluate.sensitivity import sensitivity
from squat.evaluate.tasks import label_of
from squat.model_names import runs_in_engine
from squat.quantization import SquatConfig, quantize
from squat.report import study_figures
from squat.report.sections import Section, Table, write_section
from squat.runs import calibration_batches
from squat.unicode import broken_character


def comparison_study(
    models: Sequence[str],
    data: Path | None,
    pairs: Sequence[Path],
    limit: int | None,
    tokens: int | None,
    sequence_length: int,
    by_source: bool,
    speed: bool,
    *,
    csv: Path | None,
    output: Path | None,
    command: str,
) -> tuple[Table, Any]:
    """`squat.evaluate.comparison.compare`: its table, its numbers, and the files that were asked for."""
    results = compare(models, data, pairs, limit, tokens, sequence_length, by_source, speed)
    table = comparison_table(results)
    numbers = to_json(results)
    if csv is not None:
        with writing(csv) as out:
            out.write(to_csv(results).encode())
    if output is not None:
        about = "A file's size is the file's; a folder's is its weights at their bits, float ones at 16."
        write_section(output, "Models side by side", command, about, [table], {}, numbers)
    return table, numbers


def sensitivity_study(
    model: str,
    data: Path,
    output: Path,
    config: SquatConfig,
    calibration: Path | None,
    tokens: int,
    sequence_length: int,
    by_source: bool,
    command: str,
) -> Section:
    """What quantizing each part alone does to a full-precision model, without training (Figure 1).

    Args:
        model: the full-precision model's folder or Hub name.
        data: the text that the loss is measured on.
        output: folder of the section.
        config: bits and method of what is switched on; not token-adaptive.
        calibration: text for the steps; None: the model's own.
        tokens, sequence_length: how much text, in windows of which length.
        by_source: clean BabyLM's files by source.
        command: what the section says it was made by.

    Raises:
        SquatError: a model, text or config that cannot be used.
    """
    if config.token_adaptive:
        raise ConfigError(
            "--activation-bits: sensitivity is of one width; 4:8 depends on all that comes before"
        )
    network, tokenizer = _load(model)
    windows = _windows(data, tokenizer, tokens, sequence_length, by_source)
    batches = calibration_batches(network, tokenizer, calibration, by_source)
    full, effects = sensitivity(quantize(network, config, batches), windows)
    rows = [
        [e.kind, e.name, f"{e.loss:.4f}", f"{e.added:+.4f}", f"{e.mse:.3g}", f"{e.kl:.4f}"]
        for e in effects
    ]
    rows.insert(0, ["", "full precision", f"{full:.4f}", "", "", ""])
    head = ["", "quantized alone", "loss, nats", "added", "MSE of logits", "KL, nats"]
    bits = f"W{config.weight_bits}A{config.activation_bits}"
    title = f"{label_of(model)}: what {bits} does to each part, without training"
    return write_section(
        output,
        "Sensitivity",
        command,
        f"Each part of {label_of(model)} was quantized alone ({bits}, embeddings and head at "
        f"{config.embedding_bits} bits, no training) and compared with full precision on "
        f"{windows.numel():,} tokens.",
        [Table("Sensitivity", head, rows)],
        {"sensitivity": (title, study_figures.sensitivity_figure(effects, title))},
        {"full_precision_loss": full, "effects": [asdict(effect) for effect in effects]},
    )


def attention_study(
    models: Sequence[str],
    data: Path,
    text: str,
    output: Path,
    layer: int | None,
    windows: int,
    sequence_length: int,
    by_source: bool,
    command: str,
) -> Section:
    """q and k, attention maps and token widths of several models side by side (Figures 2, 3).

    Args:
        models: folders or Hub names, the full-precision one first; with one tokenizer.
        data: text for the distributions and the maps.
        text: the text whose tokens' widths are drawn.
        output: folder of the section.
        layer: whose distributions are drawn; None: the last.
        windows, sequence_length: how much of `data`.
        by_source: clean BabyLM's files by source.
        command: what the section says it was made by.

    Raises:
        SquatError: a model or text that cannot be used, or models of different depth.
    """
    if problem := broken_character(text):
        raise DataError(f"text: {problem}")
    seen: dict[str, Observation] = {}
    tokens: list[str] = []
    for model in models:
        network, tokenizer = _load(model)
        batch = _windows(data, tokenizer, windows * sequence_length, sequence_length, by_source)
        ids = _text_ids(text, tokenizer)
        tokens = [str(tokenizer.decode([token])).strip() or "␣" for token in ids]
        seen[label_of(model)] = observe(network, batch, ids)
    depths = {len(observation.maps) for observation in seen.values()}
    if len(depths) > 1:
        raise ConfigError(f"models: they have {sorted(depths)} layers; compare equals")
    (depth,) = depths
    chosen = depth - 1 if layer is None else layer
    if not 0 <= chosen < depth:
        raise ConfigError(f"--layer: {layer} does not exist; choose 0 to {depth - 1}")
    shown = sorted({0, depth // 2, depth - 1})
    figures: dict[str, tuple[str, Figure]] = {
        "distributions": (
            f"Queries and keys of layer {chosen}",
            study_figures.distribution_figure(seen, chosen),
        ),
        "maps": ("Attention, averaged over heads", study_figures.maps_figure(seen, shown)),
        "first-column": (
            "Attention to the first token, by position",
            study_figures.first_column_figure(seen, shown),
        ),
    }
    for name, observation in seen.items():
        if observation.widths is not None:
            caption = f"{name}: which tokens got 8 bits"
            drawn = study_figures.widths_figure(name, observation.widths, tokens)
            figures[f"widths-{name}"] = (caption, drawn)
    numbers = {name: _numbers(seen, name) for name in seen}
    head = [
        "",
        "layer",
        "var(q)",
        "H(q), bits",
        "var(k)",
        "H(k), bits",
        "maps: cosine to the first",
    ]
    rows = [
        [
            name,
            str(chosen),
            *(
                f"{found['layers'][chosen][key]:.2f}"
                for key in ("query_variance", "query_entropy", "key_variance", "key_entropy")
            ),
            f"{found['similarity']:.4f}",
        ]
        for name, found in numbers.items()
    ]
    first = next(iter(seen))
    return write_section(
        output,
        "Inside attention",
        command,
        f"{windows} windows of {sequence_length} tokens. Entropy is that of a histogram of "
        f"{study_figures.BINS} bins, the same for all models; the cosine is that of the head-averaged maps "
        f"of the first window to those of {first}, mean over layers.",
        [Table("Queries, keys and maps", head, rows)],
        figures,
        numbers,
    )


def _numbers(seen: dict[str, Observation], name: str) -> dict[str, Any]:
    observation = seen[name]
    layers = []
    for layer in range(len(observation.maps)):
        entry: dict[str, float] = {}
        for part in ("query", "key"):
            values = getattr(observation, part)[layer]
            counts, _ = np.histogram(values, study_figures.bin_edges(seen, part, layer))
            entry[f"{part}_variance"] = float(values.var())
            entry[f"{part}_entropy"] = entropy_bits(counts)
        layers.append(entry)
    widths = observation.widths
    return {
        "layers": layers,
        "similarity": observation.similarity(next(iter(seen.values()))),
        "first_column": observation.first_column.tolist(),
        "wide_share": None if widths is None else widths.mean(1).tolist(),
    }


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if runs_in_engine(name):
        raise ConfigError(f"{name}: a file cannot be looked into; name the checkpoint's folder")
    model, tokenizer = load_model(name), load_tokenizer(name)
    check_tokenizer(tokenizer, model.config.vocab_size)
    return model, tokenizer


def _windows(
    data: Path, tokenizer: PreTrainedTokenizerFast, tokens: int, length: int, by_source: bool
) -> Tensor:
    """The first tokens of a text as [windows, length]."""
    row = tokenize_corpus(data, tokenizer, by_source=by_source)
    count = min(tokens, len(row)) // length
    if count == 0:
        raise DataError(f"{data}: {len(row)} tokens do not fill one window of {length}")
    return torch.from_numpy(row[: count * length].astype("int64")).view(count, length)


def _text_ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError("--text: is empty; give a sentence or two")
    first = first_token(tokenizer)
    assert first is not None  # check_tokenizer has seen to it
    return [first, *ids]
