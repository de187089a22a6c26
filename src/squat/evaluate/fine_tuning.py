"""What a model can learn: fine-tuning on (Super)GLUE, in BabyLM's JSON Lines (paper, Table III).

The language-model head makes way for a classification head on the last token; everything below it stays what
it was. A quantized model stays quantized: its quantizers are active and are trained along, with the optimizer
of quantization-aware training, so that what is measured is what could be deployed. Full-precision and
quantized models of any method go through the same recipe. (The new head, a few rows, is in float.)

Metrics are those of BabyLM's published tables: accuracy, and the F1 score of the positive class for MRPC and
QQP. (CoLA is often reported as Matthews' correlation; that is measured too, and stands apart.) Beside them
stands what the most frequent label of the validation file scores, without which no such figure says much.

Every (task, seed) leaves a file when it is done, so that an interrupted evaluation goes on where it stopped,
and more tasks or seeds can be added later.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from squat.checkpoints import load_model, load_tokenizer
from squat.data.files import writing
from squat.data.tokenizer import first_token
from squat.distill.trainer import StepSizeTrainer
from squat.errors import ConfigError, DataError
from squat.hardware import in_bfloat16
from squat.report.sections import Table, write_section
from squat.terminal import Show, progress
from squat.unicode import broken_character


@dataclass(frozen=True)
class Task:
    """A task: the fields that make its input, and how it is measured.

    `measured_on`: column of the table -> stem of the validation file.
    """

    fields: tuple[str, ...]
    measured_on: dict[str, str]
    labels: int = 2
    metric: str = "accuracy"


TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), {"CoLA": "cola"}),
    "sst2": Task(("sentence",), {"SST-2": "sst2"}),
    "mrpc": Task(("sentence1", "sentence2"), {"MRPC (F1)": "mrpc"}, metric="f1"),
    "qqp": Task(("question1", "question2"), {"QQP (F1)": "qqp"}, metric="f1"),
    "mnli": Task(("premise", "hypothesis"), {"MNLI": "mnli", "MNLI-mm": "mnli-mm"}, labels=3),
    "qnli": Task(("question", "sentence"), {"QNLI": "qnli"}),
    "rte": Task(("sentence1", "sentence2"), {"RTE": "rte"}),
    "boolq": Task(("question", "passage"), {"BoolQ": "boolq"}),
    "multirc": Task(("paragraph", "question", "answer"), {"MultiRC": "multirc"}),
    "wsc": Task(("text", "span2_text", "span1_text"), {"WSC": "wsc"}),
}
"""By the name of the training file; in the order of the paper's Table III."""


@dataclass(frozen=True)
class FineTuning:
    """The recipe, the same for every model and task.

    `learning_rate` is of the weights (linear decay, AdamW); `max_length`: tokens, longer inputs lose
    the ends of their longest field; `limit`: the first so many examples of each file, None for all.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-4
    max_length: int = 128
    precision: str = "auto"
    limit: int | None = None


_SHORTEST = 8
"""Tokens that an input is allowed at least."""

Example = dict[str, Any]


def read_examples(file: Path, task: Task, limit: int | None = None) -> list[Example]:
    """The examples of one file: `texts`, in the order of the task's fields, and `label`.

    Raises:
        DataError: unreadable, empty, or a line without one of the fields or with another label.
    """
    examples: list[Example] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(examples) == limit:
                    break
                if line.strip():
                    examples.append(_read_example(line, task, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable as UTF-8 text ({error})") from error
    if not examples:
        raise DataError(f"{file}: holds no example; fill it or choose other --tasks")
    return examples


def _read_example(line: str, task: Task, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); correct or delete the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: no JSON object; correct or delete the line")
    for field in task.fields:
        if not isinstance(record.get(field), str):
            found = json.dumps(record[field]) if field in record else "missing"
            raise DataError(f"{where}: {field!r} is {found}; the task needs a text there")
        if problem := broken_character(record[field]):
            raise DataError(f"{where}: {field!r}: {problem}")
    label = record.get("label")
    if not isinstance(label, int) or not 0 <= label < task.labels:
        raise DataError(
            f"{where}: 'label' is {json.dumps(label)}; the task's labels are 0 to {task.labels - 1}"
        )
    return {"texts": [record[field] for field in task.fields], "label": int(label)}


def training_file(folder: Path, name: str) -> Path:
    """`<task>.train.jsonl`, or the one file whose name begins with `<task>.train`.

    Raises:
        DataError: none, or several without an official one.
    """
    official = folder / f"{name}.train.jsonl"
    if official.is_file():
        return official
    found = sorted(folder.glob(f"{name}.train*.jsonl"))
    if len(found) != 1:
        what = "no training file" if not found else f"{len(found)} training files"
        raise DataError(f"{folder}: {what} {name}.train*.jsonl; give one, or choose other --tasks")
    return found[0]


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[dict[str, Any]]:
    """Token ids and labels: every field behind the begin-of-text token, as lines of training text are."""
    start = first_token(tokenizer)
    width = len(examples[0]["texts"])
    flat = [text for example in examples for text in example["texts"]]
    encoded: list[list[int]] = tokenizer(flat, add_special_tokens=False)["input_ids"]
    rows = []
    for index, example in enumerate(examples):
        fields = encoded[index * width : (index + 1) * width]
        _truncate(fields, max_length - width)
        ids = [token for field in fields for token in (start, *field)]
        rows.append({"input_ids": ids, "labels": example["label"]})
    return rows


def _truncate(fields: list[list[int]], room: int) -> None:
    """Shorten the longest field, token by token, until all fit."""
    while sum(map(len, fields)) > room:
        longest = max(range(len(fields)), key=lambda i: len(fields[i]))
        fields[longest] = fields[longest][:-1]


def classifier_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, labels: int
) -> PreTrainedModel:
    """The model with a fresh classification head instead of its language-model head.

    It is transformers' own `...ForSequenceClassification` of the architecture, around this very backbone.
    """
    config = copy.deepcopy(model.config)
    # The backbone brings its quantizers along; transformers need not make any.
    config.__dict__.pop("quantization_config", None)
    config.num_labels = labels
    pad = tokenizer.pad_token_id
    config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    return classifier


class _Bar(TrainerCallback):
    def __init__(self, show: Show) -> None:
        self.show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.show(state.global_step, state.max_steps)


def fine_tune(
    name: str,
    task_name: str,
    data: Path,
    recipe: FineTuning,
    seed: int,
) -> dict[str, Any]:
    """Train one task with one seed and measure it.

    Returns:
        "train": the training file's name and its number of examples; "scores": column of the table ->
        accuracy, F1, Matthews' correlation, and what the most frequent label scores.

    Raises:
        SquatError: the model or the data cannot be used.
    """
    task = TASKS[task_name]
    file = training_file(data, task_name)
    tokenizer = load_tokenizer(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    train = read_examples(file, task, recipe.limit)
    valid = {
        column: read_examples(data / f"{stem}.valid.jsonl", task, recipe.limit)
        for column, stem in task.measured_on.items()
    }
    set_seed(seed)
    model = classifier_of(load_model(name), tokenizer, task.labels)
    rows = encode(train, tokenizer, recipe.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = StepSizeTrainer(
            model=model,
            args=_arguments(scratch, recipe, seed),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        with progress(f"{task_name}, seed {seed}") as show:
            trainer.add_callback(_Bar(show))
            trainer.train()
        scores = {}
        for column, examples in valid.items():
            encoded: Any = encode(examples, tokenizer, recipe.max_length)
            # In an order of the Trainer's own: by length.
            answers: Any = trainer.predict(encoded)
            scores[column] = _scores(answers.label_ids, answers.predictions.argmax(-1))
    return {"train": {"file": file.name, "examples": len(rows)}, "scores": scores}


def _arguments(folder: str, recipe: FineTuning, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.1,
        train_sampling_strategy="group_by_length",
        use_cpu=not torch.accelerator.is_available(),
        bf16=in_bfloat16(recipe.precision),
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
        report_to=[],
    )


def _scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = "binary" if labels.max() < 2 else "macro"
    majority = np.full_like(labels, Counter(labels.tolist()).most_common(1)[0][0])

    def f1(answers: np.ndarray) -> float:
        return float(f1_score(labels, answers, average=average, zero_division=0))

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": f1(predicted),
        "mcc": float(matthews_corrcoef(labels, predicted)),
        "majority_accuracy": float(accuracy_score(labels, majority)),
        "majority_f1": f1(majority),
        "examples": len(labels),
    }


def evaluate_fine_tuned(
    model: str,
    label: str,
    data: Path,
    output: Path,
    tasks: Sequence[str] = tuple(TASKS),
    seeds: int = 3,
    recipe: FineTuning | None = None,
) -> dict[str, Any]:
    """Fine-tune and measure a model on every task with every seed; what is done already is read.

    Args:
        model: a model's folder.
        label: what the model is called in tables, and its folder's name in `output`.
        data: the folder of `<task>.train.jsonl` and `<task>.valid.jsonl`.
        output: where results are kept: `<output>/<label>/<task>-<seed>.json`. Several models that are
            evaluated into the same folder stand in one table.
        tasks: rows of TASKS.
        seeds: how many; they are 0, 1, ...
        recipe: the same for all of them.

    Returns:
        The results in the form of `read_results`.

    Raises:
        SquatError: an unknown task, data or a model that cannot be used, or results of another recipe.
    """
    recipe = recipe or FineTuning()
    _check_scikit_learn()
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"--tasks: {task!r} does not exist; choose from {', '.join(TASKS)}")
    if recipe.max_length < _SHORTEST:
        raise ConfigError(f"--sequence-length: {recipe.max_length} is below {_SHORTEST}")
    _claim(output, recipe)
    folder = output / label
    for task in tasks:
        for seed in range(seeds):
            _fine_tune_once(folder / f"{task}-{seed}.json", model, task, data, recipe, seed)
    return read_results(folder)


def _claim(output: Path, recipe: FineTuning) -> None:
    """All results of a folder stand in one table, so they come from one recipe."""
    file = output / "recipe.json"
    if not file.exists():
        with writing(file) as out:
            out.write(json.dumps(asdict(recipe), indent=1).encode())
    elif (found := json.loads(file.read_text())) != asdict(recipe):
        raise ConfigError(
            f"--output: {output} holds results of another recipe ({json.dumps(found)}); choose another "
            "folder, or the same settings"
        )


def _fine_tune_once(
    file: Path, model: str, task: str, data: Path, recipe: FineTuning, seed: int
) -> None:
    if file.exists():
        found = json.loads(file.read_text())["model"]
        if found != model:
            raise ConfigError(
                f"{file}: is a result of {found}, not of {model}; choose another --output, or remove the "
                "file to measure anew"
            )
        return
    result = fine_tune(model, task, data, recipe, seed)
    with writing(file) as out:
        out.write(
            json.dumps({"model": model, "task": task, "seed": seed, **result}, indent=1).encode()
        )


def _check_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--task glue: needs scikit-learn; install it with pip install 'squat[eval]'"
        ) from error


def read_results(folder: Path) -> dict[str, Any]:
    """What is done of a model: its training files, and per column mean and deviation over seeds.

    Returns:
        {"model", "train": task -> {"file", "examples"}, "columns": column -> {"mean", "deviation" (of
        one seed: None), "seeds", "majority", "mcc"}, "average": mean over the columns}. Scores are 0 to 1.
    """
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))]
    columns: dict[str, Any] = {}
    for name, task in TASKS.items():
        for column in task.measured_on:
            scores = [run["scores"][column] for run in runs if run["task"] == name]
            if scores:
                columns[column] = _summary(scores, task.metric)
    return {
        "model": runs[0]["model"],
        "train": {run["task"]: run["train"] for run in runs},
        "columns": columns,
        "average": fmean(column["mean"] for column in columns.values()),
    }


def _summary(scores: list[dict[str, float]], metric: str) -> dict[str, Any]:
    values = [score[metric] for score in scores]
    return {
        "mean": fmean(values),
        "deviation": stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "majority": scores[0][f"majority_{metric}"],
        "mcc": fmean(score["mcc"] for score in scores),
    }


def results_of_all(output: Path) -> dict[str, dict[str, Any]]:
    """Label -> results, for every model that was evaluated into `output`, in the order of time."""
    folders = {file.parent for file in output.glob("*/*-*.json")}
    by_age = sorted(folders, key=lambda folder: min(f.stat().st_mtime for f in folder.iterdir()))
    return {folder.name: read_results(folder) for folder in by_age}


def fine_tuning_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The paper's Table III: one row a model, one column a task, in %; the average over its columns."""
    found = {column for result in results.values() for column in result["columns"]}
    columns = [c for task in TASKS.values() for c in task.measured_on if c in found]
    majority = {c: r["columns"][c]["majority"] for r in results.values() for c in r["columns"]}
    rows = [["most frequent label", *_cells(majority, columns), "0.0"]]
    for name, result in results.items():
        means = {column: entry["mean"] for column, entry in result["columns"].items()}
        deviations = {c: e["deviation"] for c, e in result["columns"].items()}
        cola = result["columns"].get("CoLA")
        cells = _cells(means, columns, deviations)
        rows.append([name, *cells, "" if cola is None else f"{100 * cola['mcc']:.1f}"])
    head = ["model", *columns, "average", "CoLA (MCC)"]
    return Table("Fine-tuning on (Super)GLUE, %", head, rows)


def write_fine_tuning(output: Path, command: str) -> Table:
    """The table of all models in `output`, which becomes a section of a report."""
    results = results_of_all(output)
    table = fine_tuning_table(results)
    recipe = json.loads((output / "recipe.json").read_text())
    about = (
        f"The same recipe for every model ({', '.join(f'{k} {v}' for k, v in recipe.items())}); quantizers "
        "active and trained along. Accuracy, F1 where it says so; ± is the deviation over seeds; the first "
        "row always gives the validation file's most frequent label."
    )
    trained_on = {
        task: train["file"] for r in results.values() for task, train in r["train"].items()
    }
    if others := [f for task, f in sorted(trained_on.items()) if f != f"{task}.train.jsonl"]:
        about += f" Not the official training data: {', '.join(others)}."
    write_section(output, "Fine-tuning", command, about, [table], {}, results)
    return table


def _cells(
    values: Mapping[str, float],
    columns: Sequence[str],
    deviations: Mapping[str, float | None] | None = None,
) -> list[str]:
    """One cell a column and one for the average, which only a complete row has."""

    def cell(column: str) -> str:
        if column not in values:
            return ""
        deviation = (deviations or {}).get(column)
        spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
        return f"{100 * values[column]:.1f}{spread}"

    complete = all(column in values for column in columns)
    average = f"{100 * fmean(values[c] for c in columns):.1f}" if complete else ""
    return [*map(cell, columns), average]
