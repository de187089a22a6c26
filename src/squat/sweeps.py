"""Sweeps: training runs that differ in a few settings, one after another, and the table they make.

    squat sweep recipes/babylm-6m

The folder holds sweep.yaml (`squat.recipes.Sweep`). Every run is trained, exported and measured; after each
of them the table of all is written, so that a sweep that is stopped leaves the rows it has:

    OUTPUT/NAME/seed-SEED/   a run of `squat train`, with model.gguf and measured.json
    OUTPUT/full-precision/   measured.json of the model that the runs start from
    OUTPUT/table.md  table.csv  table.json

Starting it again resumes: what was measured is read back, an interrupted run goes on at its checkpoint.
A run that fails is reported in its row, and the others go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from squat.checkpoints import load_model, load_tokenizer
from squat.data.files import writing
from squat.deploy.export import export
from squat.errors import CheckpointError, ConfigError, SquatError, UnfinishedError
from squat.evaluate.tasks import TASKS, Settings, run_task
from squat.recipes import Evaluation, TrainRecipe, read_sweep
from squat.report.sweep import FULL_PRECISION, Row, write_tables
from squat.runs import is_run_of, train
from squat.terminal import show

_MEASURED = "measured.json"


@dataclass
class _Job:
    """A row of the table, where its files are, and how to make the model, unless it is there already."""

    row: Row
    folder: Path
    recipe: TrainRecipe | None = None


def run_sweep(
    folder: Path, console: Console, only: Collection[str] = (), max_minutes: float | None = None
) -> list[Row]:
    """Run what is still to be done of the sweep in `folder`; returns the rows of its table.

    Args:
        folder: holds sweep.yaml.
        console: where to say what is going on.
        only: names of rows; the others stay as they are. Empty: all.
        max_minutes: stop training, with a checkpoint, when so much time has passed.

    Raises:
        UnfinishedError: time was up; the same call goes on from there.
        ConfigError: sweep.yaml, the recipe of one of its runs, or a name in `only` is not possible.
        DataError: the table cannot be written.
    """
    end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    file = folder / "sweep.yaml"
    sweep, runs = read_sweep(file)
    output = Path(sweep.output)
    jobs = [_Job(Row(r.name, r.seed), Path(r.recipe.output), r.recipe) for r in runs]
    if sweep.full_precision:
        jobs.insert(0, _Job(Row(FULL_PRECISION, None), output / FULL_PRECISION))
    for name in only:
        if name not in (names := dict.fromkeys(job.row.run for job in jobs)):
            raise ConfigError(f"{file}: no run {name!r}; there are {', '.join(names)}")

    rows = [job.row for job in jobs]
    for job in jobs:
        job.row.measured = _finished(job, sweep.evaluate)
    todo = [job for job in jobs if not job.row.measured and (not only or job.row.run in only)]
    for number, job in enumerate(todo, start=1):
        torch.compiler.reset()  # what was compiled for the runs before counts towards its limits
        console.rule(f"{job.row.title} ({number} of {len(todo)})", align="left")
        try:
            if job.recipe is None:
                job.row.measured = _measure(
                    runs[0].recipe.model, job.folder, sweep.evaluate, {"measured_in": "PyTorch"}
                )
            else:
                left = None if end is None else max(0.0, end - time.monotonic()) / 60
                checkpoint = train(job.recipe, left)
                job.row.measured = _export_and_measure(checkpoint, job.folder, sweep.evaluate)
        except UnfinishedError:
            raise
        except (SquatError, RuntimeError) as error:  # torch's own are RuntimeErrors: shapes, memory
            job.row.problem = " ".join(str(error).split())
            console.print(f"failed: {job.row.problem}", style="red", markup=False)
        write_tables(output, rows)
    for table in write_tables(output, rows):
        show(table.to_rich())
    return rows


def _export_and_measure(checkpoint: Path, folder: Path, evaluate: Evaluation) -> dict[str, Any]:
    name, file = str(checkpoint), folder / "model.gguf"
    log = json.loads((folder / "log.json").read_text())["log"]
    try:
        export(load_model(name), load_tokenizer(name), folder.parent.name, file)
    except CheckpointError as error:  # bits or a policy that the engine has not
        about = {"training": log[-1], "measured_in": "PyTorch", "not_in_engine": str(error)}
        return _measure(name, folder, evaluate, about)
    return _measure(str(file), folder, evaluate, {"training": log[-1], "measured_in": "engine"})


def _measure(
    model: str, folder: Path, evaluate: Evaluation, about: dict[str, Any]
) -> dict[str, Any]:
    """What the tasks say of a model, each asked once for the same settings; kept in measured.json."""
    measured = {**_stored(folder), **about}
    for task, settings in _tasks(evaluate).items():
        if not _is_measured(measured, task, settings):
            _, result = run_task(task, model, settings)
            measured[task] = {"settings": _plain(settings), **result}
            with writing(folder / _MEASURED) as out:
                out.write(json.dumps(measured, indent=1).encode())
    return _asked(measured, evaluate)


def _finished(job: _Job, evaluate: Evaluation) -> dict[str, Any] | None:
    """What was measured of a row that needs no more work."""
    measured = _stored(job.folder)
    tasks = _tasks(evaluate).items()
    if not all(_is_measured(measured, task, settings) for task, settings in tasks):
        return None
    if job.recipe is not None and not is_run_of(job.folder, job.recipe):
        return None
    return _asked(measured, evaluate)


def _asked(measured: dict[str, Any], evaluate: Evaluation) -> dict[str, Any]:
    """Without the tasks that an earlier evaluation asked for and this one does not."""
    dropped = TASKS.keys() - _tasks(evaluate).keys()
    return {name: value for name, value in measured.items() if name not in dropped}


def _stored(folder: Path) -> dict[str, Any]:
    file = folder / _MEASURED
    return json.loads(file.read_text()) if file.exists() else {}


def _is_measured(measured: dict[str, Any], task: str, settings: Settings) -> bool:
    return task in measured and measured[task]["settings"] == _plain(settings)


def _plain(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "data": [str(path) for path in settings.data]}


def _tasks(evaluate: Evaluation) -> dict[str, Settings]:
    tasks = {}
    if evaluate.text is not None:
        tasks["perplexity"] = Settings(
            [Path(evaluate.text)],
            sequence_length=evaluate.sequence_length,
            by_source=evaluate.by_source,
        )
    if evaluate.pairs:
        tasks["blimp"] = Settings([Path(p) for p in evaluate.pairs], limit=evaluate.limit)
    return tasks
