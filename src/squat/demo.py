"""The demo: the whole job on built-in text, in minutes on two cores.

A small Llama learns the English of the built-in grammar from scratch, is quantized to 4-bit weights with
4:8 tokens, trained to make up for it, and measured beside full precision and beside the same
quantization without training. Then it is exported, speaks through the C++ engine, and both are timed.
It is what `squat pretrain`, `train`, `eval`, `export` and `generate` do, one after the other; an
interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.checkpoints import load_model, load_tokenizer
from squat.data import tokenize_corpus, write_corpus
from squat.data.files import writing
from squat.deploy.export import export
from squat.engine import Engine
from squat.evaluate import evaluate_minimal_pairs, perplexity, read_minimal_pairs
from squat.evaluate.huggingface import HuggingFaceScorer
from squat.evaluate.speed import tokens_per_second
from squat.generation import continue_text
from squat.quantization import SquatConfig, quantize
from squat.recipes import (
    Data,
    Distillation,
    ModelShape,
    PretrainRecipe,
    TokenizerTraining,
    Training,
    TrainRecipe,
)
from squat.report.figures import comparison_figure
from squat.runs import pretrain, train
from squat.terminal import show

SENTENCES = 80_000
SEQUENCE = 64
PROMPT = "The girls that"


@dataclass(frozen=True)
class Measured:
    """One row of the demo's table."""

    loss: float
    pairs: float
    megabytes: float


def run_demo(folder: Path, console: Console) -> None:
    """Run the demo in `folder`; it ends with a table, figure.png and a generated text.

    Raises:
        SquatError: the folder cannot be written to.
    """
    corpus = folder / "corpus"
    if not (corpus / "pairs").exists():
        console.rule("1. Built-in text: a small grammar of English writes it")
        write_corpus(corpus, SENTENCES, seed=0)
    console.rule("2. A small Llama, trained from scratch in full precision")
    teacher = pretrain(_pretrain_recipe(folder, corpus))
    console.rule(
        "3. Squat: 4-bit weights, 4- or 8-bit tokens, trained with the original as teacher"
    )
    student = train(_train_recipe(folder, corpus, teacher))

    console.rule("4. What is left of what it knew")
    tokenizer = load_tokenizer(str(teacher))
    rows = {
        "Full precision": _measure(load_model(str(teacher)), tokenizer, corpus, bits=(32, 32)),
        "PTQ W4, 4:8 tokens": _measure(
            _untrained(teacher, tokenizer, corpus), tokenizer, corpus, bits=(4, 8)
        ),
        "Squat W4, 4:8 tokens": _measure(load_model(str(student)), tokenizer, corpus, bits=(4, 8)),
    }
    show(_table(rows))
    console.rule("5. One file, and the engine that runs it in integers")
    file = folder / "squat.gguf"
    model = load_model(str(student))
    export(model, tokenizer, "squat-demo", file)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, tokenizer inside\n")
    for piece in continue_text(str(file), PROMPT, 40, temperature=0.7, top_p=0.9, seed=1):
        print(piece, end="", flush=True)
    print("\n")
    speeds = _speeds(load_model(str(teacher)), model, Engine(file), tokenizer, corpus)
    show(_speed_table(speeds))
    _save(folder, rows, speeds)
    print(f"Table, figure, models and the file: {folder}")
    print(f"Next: {next_command(file)}")


def next_command(file: Path) -> str:
    """What to do with the demo's file, as it works in this shell: `squat` may not be on its path."""
    squat = ["squat"] if shutil.which("squat") else [sys.executable, "-m", "squat"]
    return shlex.join([*squat, "generate", str(file), "The boy near the tree"])


def _speeds(
    full: PreTrainedModel,
    student: PreTrainedModel,
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Path,
) -> dict[str, tuple[float, float]]:
    """Tokens per second of prefill and of decoding, on the same tokens; medians of five runs."""
    ids = tokenize_corpus(corpus / "dev", tokenizer, corpus.parent / "cache")[:128].tolist()
    return {
        "PyTorch, full precision": tokens_per_second(full, ids),
        "PyTorch, fake-quantized": tokens_per_second(student, ids),
        "Squat engine": tokens_per_second(engine, ids),
    }


def _speed_table(speeds: dict[str, tuple[float, float]]) -> Table:
    table = Table(title="Speed here, tokens/s")
    for heading in ("", "prefill of 64", "decode of 64"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (prefill, decode) in speeds.items():
        table.add_row(name, f"{prefill:,.0f}", f"{decode:,.0f}")
    return table


def _pretrain_recipe(folder: Path, corpus: Path) -> PretrainRecipe:
    return PretrainRecipe(
        output=str(folder / "full-precision"),
        model=ModelShape.model_validate(
            {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
                "tie_word_embeddings": True,
            }
        ),
        tokenizer=TokenizerTraining(vocab_size=1200, min_frequency=2),
        data=_data(folder, corpus),
        training=Training(
            steps=600, warmup_steps=60, learning_rate=4e-3, save_every=200, log_every=50
        ),
    )


def _train_recipe(folder: Path, corpus: Path, teacher: Path) -> TrainRecipe:
    return TrainRecipe(
        output=str(folder / "squat"),
        model=str(teacher),
        data=_data(folder, corpus),
        training=Distillation(
            steps=250, warmup_steps=25, learning_rate=5e-4, save_every=100, log_every=25
        ),
    )


def _data(folder: Path, corpus: Path) -> Data:
    return Data(train=str(corpus / "train"), sequence_length=SEQUENCE, cache=str(folder / "cache"))


def _untrained(teacher: Path, tokenizer: PreTrainedTokenizerFast, corpus: Path) -> PreTrainedModel:
    """The same quantization, calibrated on the same text, without training (PTQ)."""
    tokens = tokenize_corpus(corpus / "train", tokenizer, corpus.parent / "cache")
    sample = torch.tensor(tokens[: 32 * SEQUENCE].astype("int64")).view(32, SEQUENCE)
    return quantize(load_model(str(teacher)), SquatConfig(), calibration=[sample])


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Path,
    bits: tuple[int, int],
) -> Measured:
    """Loss on held-out text, accuracy on held-out minimal pairs, size at (matrix, embedding) bits."""
    tokens = tokenize_corpus(corpus / "dev", tokenizer, corpus.parent / "cache")
    loss = perplexity(model, tokens, SEQUENCE, batch_size=64).loss
    pairs = evaluate_minimal_pairs(
        HuggingFaceScorer(model, tokenizer), read_minimal_pairs(corpus / "pairs")
    )
    embedding = model.get_parameter("model.embed_tokens.weight").numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - embedding
    size = (matrices * bits[0] + embedding * bits[1]) / 8e6
    return Measured(loss, 100 * (pairs.average_paradigms or 0.0), size)


def _table(rows: dict[str, Measured]) -> Table:
    table = Table(title="Held-out text and grammar (chance on minimal pairs: 50 %)")
    table.add_column("model")
    for heading in ("loss, nats/token", "minimal pairs, %", "weights, MB"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row.loss:.4f}", f"{row.pairs:.1f}", f"{row.megabytes:.2f}")
    return table


def _save(folder: Path, rows: dict[str, Measured], speeds: dict[str, tuple[float, float]]) -> None:
    numbers: dict[str, dict[str, Any]] = {name: vars(row) for name, row in rows.items()}
    with writing(folder / "results.json") as out:
        out.write(json.dumps({"models": numbers, "tokens_per_s": speeds}, indent=2).encode())
    full, _, squat = rows
    decode = {full: speeds["PyTorch, full precision"][1], squat: speeds["Squat engine"][1]}
    shown = {
        name: {
            "added": row.loss - rows[full].loss,
            "megabytes": row.megabytes,
            **({"decode": decode[name]} if name in decode else {}),
        }
        for name, row in rows.items()
    }
    figure = comparison_figure(
        "What 4 bits cost, and what they save (a small Llama on built-in text)",
        shown,
        {
            "added": "loss added, nats/token",
            "megabytes": "weights, MB",
            "decode": "tokens/s (PyTorch; engine)",
        },
    )
    with writing(folder / "figure.png") as out:
        figure.savefig(out, format="png", dpi=120)
