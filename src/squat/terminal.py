"""What reaches a terminal: tables that fit it, how far work is, and text as it is.

Nothing here reads markup: a path or a model's name with brackets or colons is shown as it stands. How far
work is, is said on standard error: by a bar where that is a terminal, by a line now and then where it is not.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(markup=False, emoji=False, highlight=False)

SECONDS = 30.0
"""Between two lines that say how far work is."""

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
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(description: str) -> Show:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            print(f"{description}: {done:,} of {total:,}", file=sys.stderr, flush=True)

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
