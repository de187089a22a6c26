"""The table of a sweep: for people (Markdown), for spreadsheets (CSV) and for programs (JSON).

A run that was trained with several seeds is one line of the Markdown: mean ± sample standard deviation. CSV
and JSON hold every seed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from squat.data.files import writing
from squat.report.sections import Table

FULL_PRECISION = "full-precision"
"""The name of the row that was not trained, but started from."""

MEASURES = {
    "loss": "loss, nats",
    "added": "above full precision",
    "perplexity": "perplexity",
    "average_fields": "BLiMP, 12 fields",
    "average_with_supplement": "with supplement",
    "average_paradigms": "all paradigms",
    "wide_share": "8-bit tokens",
}
"""The columns, as far as anything was measured; accuracies are in percent."""


@dataclass
class Row:
    """One trained model of a sweep, or the one that all start from.

    measured: what the tasks returned, `perplexity` and `blimp`; `training`, the last entry of the training
    log; `measured_in`, engine or PyTorch. problem: why there is no such thing.
    """

    run: str
    seed: int | None
    measured: dict[str, Any] | None = None
    problem: str | None = None

    @property
    def title(self) -> str:
        """How the row is called."""
        return self.run if self.seed is None else f"{self.run}, seed {self.seed}"

    @property
    def status(self) -> str:
        """Done, failed or to do."""
        if self.problem is not None:
            return "failed"
        return "to do" if self.measured is None else "done"

    @property
    def fields(self) -> dict[str, float]:
        """Accuracy by field of BLiMP and by task of the supplement, in percent."""
        blimp = (self.measured or {}).get("blimp", {})
        both = {**blimp.get("fields", {}), **blimp.get("supplement", {})}
        return {name: 100 * value for name, value in both.items()}

    def value(self, measure: str, reference: Row | None = None) -> float | None:
        """One of `MEASURES`; `added` is relative to the reference's loss."""
        measured = self.measured or {}
        if measure == "added":
            loss = self.value("loss")
            base = None if reference is None else reference.value("loss")
            return None if loss is None or base is None or self is reference else loss - base
        if measure == "wide_share":
            return measured.get("training", {}).get(measure)
        if measure in measured.get("perplexity", {}):
            return measured["perplexity"][measure]
        share = measured.get("blimp", {}).get(measure)
        return None if share is None else 100 * share


def write_tables(folder: Path, rows: Sequence[Row]) -> list[Table]:
    """Write table.md, table.csv and table.json to `folder`; returns what the Markdown shows."""
    tables = _tables(rows)
    markdown = "\n".join(map(_markdown, tables))
    texts = {"md": markdown, "csv": _csv(rows), "json": json.dumps(plain(rows), indent=1)}
    for suffix, text in texts.items():
        with writing(folder / f"table.{suffix}") as out:
            out.write(text.encode())
    return tables


def _reference(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.run == FULL_PRECISION), None)


def _by_run(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        name: [row for row in rows if row.run == name]
        for name in dict.fromkeys(r.run for r in rows)
    }


def _values(rows: Sequence[Row], measure: str, reference: Row | None) -> list[float]:
    found = (row.value(measure, reference) for row in rows)
    return [value for value in found if value is not None]


def _shown_measures(rows: Sequence[Row]) -> list[str]:
    return [name for name in MEASURES if _values(rows, name, _reference(rows))]


def _tables(rows: Sequence[Row]) -> list[Table]:
    reference, runs, measures = _reference(rows), _by_run(rows), _shown_measures(rows)
    head = ["run", *(MEASURES[name] for name in measures), "seeds", "measured in"]
    lines = []
    for name, seeds in runs.items():
        cells = [
            _cell(_values(seeds, measure, reference), _digits(measure)) for measure in measures
        ]
        done = sum(row.status == "done" for row in seeds)
        places = sorted({row.measured["measured_in"] for row in seeds if row.measured})
        state = next((row.problem for row in seeds if row.problem), None) or ", ".join(places)
        lines.append([name, *cells, f"{done} of {len(seeds)}", state.replace("|", "/")])
    tables = [Table("Runs", head, lines)]
    fields = dict.fromkeys(field for row in rows for field in row.fields)
    if fields:
        shown = {name: seeds for name, seeds in runs.items() if any(row.fields for row in seeds)}
        lines = []
        for field in fields:
            found = [
                [r.fields[field] for r in seeds if field in r.fields] for seeds in shown.values()
            ]
            lines.append([field, *(_cell(values, 1) for values in found)])
        tables.append(Table("Fields", ["BLiMP, %", *shown], lines))
    return tables


def _digits(measure: str) -> int:
    return {"loss": 4, "added": 4, "perplexity": 2, "wide_share": 2}.get(measure, 1)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _markdown(table: Table) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in (table.head, *table.rows)]
    return "\n".join([head, "|---" * len(table.head) + "|", *body, ""])


def _csv(rows: Sequence[Row]) -> str:
    reference, measures = _reference(rows), list(MEASURES)
    fields = list(dict.fromkeys(field for row in rows for field in row.fields))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["run", "seed", "status", *measures, *fields])
    for row in rows:
        values = [row.value(measure, reference) for measure in measures]
        table.writerow([row.run, row.seed, row.status, *values, *map(row.fields.get, fields)])
    return out.getvalue()


def plain(rows: Sequence[Row]) -> dict[str, Any]:
    """Every row with all that was measured, and for each run and measure the mean over its seeds."""
    reference = _reference(rows)
    summary: dict[str, Any] = {}
    for name, seeds in _by_run(rows).items():
        found = {measure: _values(seeds, measure, reference) for measure in MEASURES}
        summary[name] = {
            measure: {
                "mean": fmean(values),
                "standard_deviation": stdev(values) if len(values) > 1 else None,
                "seeds": len(values),
            }
            for measure, values in found.items()
            if values
        }
    plain = [
        {"run": row.run, "seed": row.seed, "status": row.status, "problem": row.problem}
        | (row.measured or {})
        for row in rows
    ]
    return {"summary": summary, "rows": plain}
