"""How a command says what came out: to people as a table or lines, to programs as JSON.

Every command that has a result takes `--json FILE`. With `-` for FILE the JSON is all there is on standard
output; what would stand there otherwise is not printed, or goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from squat.terminal import show

Json = Annotated[
    Path | None, typer.Option("--json", help="Write the result here as well; - for stdout.")
]


def report(shown: Table | str, result: object, file: Path | None) -> None:
    """Show the result and write it as JSON, or print only that where `file` is "-"."""
    text = dumps(result, indent=2)
    if str(file) == "-":
        print(text)
        return
    if isinstance(shown, Table):
        show(shown)
    else:
        print(shown)
    if file is not None:
        from squat.data.files import writing

        with writing(file) as out:
            out.write(text.encode())


@contextmanager
def only_json(file: Path | None) -> Iterator[None]:
    """Inside, what is printed on the way goes to standard error, if standard output is for JSON."""
    if str(file) != "-":
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
