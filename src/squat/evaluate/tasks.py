"""The tasks of `squat eval`: a name, a model folder or .gguf file, and data make a table and numbers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from squat.errors import ConfigError, DataError
from squat.evaluate.minimal_pairs import (
    evaluate_minimal_pairs,
    minimal_pairs_table,
    read_minimal_pairs,
)
from squat.evaluate.perplexity import perplexity, perplexity_table
from squat.evaluate.scorer import Scorer
from squat.model_names import runs_in_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from squat.engine import Engine


@dataclass(frozen=True)
class Settings:
    """What a task needs beside the model; each takes what concerns it."""

    data: Sequence[Path]
    limit: int | None = None
    batch_size: int = 64
    sequence_length: int = 128
    by_source: bool = True


@dataclass(frozen=True)
class FineTuningSettings(Settings):
    """What fine-tuning needs besides."""

    output: Path = Path("runs/glue")
    tasks: str | None = None
    seeds: int = 3
    epochs: int = 3
    learning_rate: float = 1e-4
    train_batch_size: int = 32


Answer = tuple[Table, dict[str, Any]]


def label_of(model: str) -> str:
    """What a model is called in a table: its folder or file; of a run's `model/` or file, the run."""
    path = Path(os.path.abspath(model))
    if path.stem != "model":
        return path.stem
    run = path.resolve().parent
    return f"{run.parent.name}-{run.name}" if run.name.startswith("seed-") else run.name


def blimp(model: str, settings: Settings) -> Answer:
    """Accuracy on minimal pairs by summed log-probability."""
    paradigms = read_minimal_pairs(*settings.data, limit=settings.limit)
    result = evaluate_minimal_pairs(_scorer(model, settings.batch_size), paradigms)
    return minimal_pairs_table({model: result}), result.to_dict()


def perplexity_of_text(model: str, settings: Settings) -> Answer:
    """Perplexity of the text in one folder or file."""
    from squat.data import check_tokenizer, tokenize_corpus

    if len(settings.data) != 1:
        raise DataError(f"--data: perplexity is of one text; {len(settings.data)} were given")
    loaded: Any
    if runs_in_engine(model):
        from squat.engine import Engine

        loaded = Engine(model)
        tokenizer, vocabulary = engine_tokenizer(loaded), loaded.info.vocab_size
    else:
        from squat.checkpoints import load_model, load_tokenizer

        loaded, tokenizer = load_model(model), load_tokenizer(model)
        vocabulary = loaded.config.vocab_size
    check_tokenizer(tokenizer, vocabulary)
    tokens = tokenize_corpus(settings.data[0], tokenizer, by_source=settings.by_source)
    result = perplexity(loaded, tokens, settings.sequence_length, settings.batch_size)
    return perplexity_table({model: result}), result.to_dict()


def engine_tokenizer(engine: Engine) -> PreTrainedTokenizerFast:
    """The tokenizer inside a .gguf file, as one of transformers."""
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": engine.info.bos_token, "eos_token": engine.info.eos_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=engine.tokenizer,
        **{
            name: engine.tokenizer.id_to_token(index)
            for name, index in special.items()
            if index is not None
        },
    )


def glue(model: str, settings: Settings) -> Answer:
    """(Super)GLUE by fine-tuning; the table holds every model evaluated into the same folder."""
    from squat.evaluate import fine_tuning

    if len(settings.data) != 1:
        raise DataError(f"--data: glue is one folder; {len(settings.data)} were given")
    assert isinstance(settings, FineTuningSettings)
    if runs_in_engine(model):
        raise ConfigError(f"{model}: a file cannot be fine-tuned; name the checkpoint's folder")
    recipe = fine_tuning.FineTuning(
        settings.epochs,
        settings.train_batch_size,
        settings.learning_rate,
        settings.sequence_length,
        limit=settings.limit,
    )
    tasks = list(fine_tuning.TASKS) if settings.tasks is None else settings.tasks.split(",")
    result = fine_tuning.evaluate_fine_tuned(
        model, label_of(model), settings.data[0], settings.output, tasks, settings.seeds, recipe
    )
    words = ["squat", "eval", model, "--task", "glue", "--data", str(settings.data[0])]
    words += ["--tasks", ",".join(tasks), "--seeds", str(settings.seeds), "--output"]
    command = shlex.join([*words, str(settings.output)])
    return fine_tuning.write_fine_tuning(settings.output, command).to_rich(), result


TASKS: dict[str, Callable[[str, Settings], Answer]] = {
    "blimp": blimp,
    "perplexity": perplexity_of_text,
    "glue": glue,
}


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's command line, with Squat's models on its list.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "lm-eval: is not installed; install it with pip install 'squat[eval]'"
        ) from error
    from squat.evaluate.harness import run

    run(arguments)


def run_task(task: str, model: str, settings: Settings) -> Answer:
    """The table to show and the numbers to keep.

    Raises:
        SquatError: an unknown task, or a model or data that cannot be used.
    """
    if task not in TASKS:
        raise ConfigError(f"--task: {task!r} does not exist; choose one of {', '.join(TASKS)}")
    return TASKS[task](model, settings)


def _scorer(model: str, batch_size: int) -> Scorer:
    if runs_in_engine(model):
        from squat.engine import Engine

        return Engine(model)
    from squat.checkpoints import load_model, load_tokenizer
    from squat.evaluate.huggingface import HuggingFaceScorer

    return HuggingFaceScorer(load_model(model), load_tokenizer(model), batch_size)
