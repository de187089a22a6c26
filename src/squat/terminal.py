"""What reaches a terminal: tables that fit it, how far work is, and text as it is.

Nothing here reads markup: a path or a model's name with brackets or colons is shown as it stands. How far
work is, is said on standard error: by a bar where that is a terminal, by a line now and then where it is not.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from textwrap import fill
from typing import TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(markup=False, emoji=False, highlight=False)

FIRST_SECONDS, SECONDS = 2.0, 30.0
"""Before the first line that says how far work is, and between two."""

Item = TypeVar("Item")
Show = Callable[[int, int], None]
"""Takes how much is done, and of how much."""


def write_what_cannot_be_encoded() -> None:
    """From here on, standard output escapes characters that its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def show(table: Table) -> None:
    """Print a table so that no word and no number is cut: where the terminal is too narrow for its
    longest words, without blanks around them, and then row by row.
    """
    if _least_width(table) > console.width:
        table.padding = (0, 0)
    if _least_width(table) > console.width:
        _show_by_row(table)
        return
    for column, width in zip(table.columns, _widths(table), strict=True):
        column.width = width
    console.print(table)


def two_columns(facts: Mapping[str, object], title: str | None = None) -> Table:
    """A table of things and what they are; one that is a list has a row for each."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        for part in value if isinstance(value, list) else [value]:
            table.add_row(name, str(part))
    return table


def _ranges(table: Table) -> list[Measurement]:
    """The least width of each column, that of its longest word, and the width that wraps nothing."""
    wide = console.options.update(max_width=10_000)
    return [
        Measurement(
            max(
                Measurement.get(console, wide, cell).minimum
                for cell in (column.header, *column.cells)
            ),
            max(
                Measurement.get(console, wide, cell).maximum
                for cell in (column.header, *column.cells)
            ),
        )
        for column in table.columns
    ]


def _around(table: Table) -> int:
    """The width of all that is no cell: edges, lines and padding."""
    _, right, _, left = Padding.unpack(table.padding)
    return len(table.columns) * (left + right + 1) + 1


def _least_width(table: Table) -> int:
    return _around(table) + sum(range_.minimum for range_ in _ranges(table))


def _widths(table: Table) -> list[int]:
    """The widest column gives way first, none below its longest word. (rich's own would cut words.)"""
    ranges = _ranges(table)
    widths = [range_.maximum for range_ in ranges]
    while sum(widths) + _around(table) > console.width:
        wide = [i for i, range_ in enumerate(ranges) if widths[i] > range_.minimum]
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _show_by_row(table: Table) -> None:
    lines = [str(table.title)] if table.title else []
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        lines.append("")
        for column, cell in zip(table.columns, cells, strict=True):
            lines.append(f"{column.header}: {cell}" if str(column.header) else str(cell))
    lines += ["", str(table.caption)] if table.caption else []
    for line in lines:
        print(fill(line, console.width, break_long_words=False, break_on_hyphens=False))


class _Rate(ProgressColumn):
    """How much is done in a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else _rate(task.speed))


def _rate(speed: float) -> str:
    """More digits where less is done."""
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"


@contextmanager
def progress(description: str) -> Iterator[Show]:
    """Say how far some work is; call the result with how much is done, and of how much."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield _lines(description)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(description: str) -> Show:
    start, due = time.monotonic(), time.monotonic() + FIRST_SECONDS
    first: int | None = None  # what an earlier run has done is no work of this one

    def show(done: int, total: int) -> None:
        nonlocal due, first
        now = time.monotonic()
        first = done if first is None else first
        if now < due:
            return
        due = now + SECONDS
        line = f"{description}: {done:,} of {total:,}"
        if done > first:
            speed = (done - first) / (now - start)
            left = timedelta(seconds=round((total - done) / speed))
            line += f", {_rate(speed)}, {left} left"
        print(line, file=sys.stderr, flush=True)

    return show


@contextmanager
def track(items: Sequence[Item], description: str) -> Iterator[Iterator[Item]]:
    """Iterate over `items` and say how far one is."""
    with progress(description) as show:

        def each() -> Iterator[Item]:
            for done, item in enumerate(items):
                show(done, len(items))
                yield item

        yield each()
