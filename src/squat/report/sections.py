"""Sections: what a study leaves behind, and what a report is made of.

A section is a folder with `section.json` (title, the command that made it, a few sentences, tables), the
figures as PNG files, and `numbers.json` with everything unrounded. `squat report` puts all sections that it
finds below a run into one page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table as RichTable

from squat.data.files import writing
from squat.errors import DataError

FILE = "section.json"


@dataclass(frozen=True)
class Table:
    """Cells as they are to be read; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]

    @property
    def words(self) -> set[int]:
        """The columns that hold words in most rows: the first one, and those like it."""

        def wordy(index: int) -> bool:
            cells = [row[index] for row in self.rows if row[index]]
            return 2 * sum(cell[0].isalpha() for cell in cells) > len(cells)

        return {0} | {index for index in range(len(self.head)) if wordy(index)}

    def to_rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.head):
            table.add_column(heading, justify="left" if index in self.words else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Section:
    """A part of a report. `figures`: caption -> PNG file, relative to the section's folder."""

    title: str
    command: str
    text: str
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)


def write_section(
    folder: Path,
    title: str,
    command: str,
    text: str,
    tables: Sequence[Table],
    figures: Mapping[str, tuple[str, Figure]],
    numbers: Any,
) -> Section:
    """Write a section's folder; its section.json comes last.

    Args:
        folder: made if missing.
        title, command, text: see the module's head.
        tables: in the order of reading.
        figures: stem of the file -> caption and figure.
        numbers: plain values.

    Raises:
        DataError: the folder cannot be written to.
    """
    for stem, (_, figure) in figures.items():
        save_figure(figure, folder / f"{stem}.png")
    with writing(folder / "numbers.json") as out:
        out.write(json.dumps(numbers, indent=1).encode())
    captions = {caption: f"{stem}.png" for stem, (caption, _) in figures.items()}
    section = Section(title, command, text, list(tables), captions)
    with writing(folder / FILE) as out:
        out.write(json.dumps(asdict(section), indent=1).encode())
    return section


def save_figure(figure: Figure, file: Path) -> None:
    """As a PNG, sharp enough for a phone."""
    with writing(file) as out:
        figure.savefig(out, format="png", dpi=150)


def read_section(folder: Path) -> Section:
    """The section in a folder.

    Raises:
        DataError: its section.json is not one.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tables = [Table(**table) for table in content.pop("tables")]
        return Section(**content, tables=tables)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: not a section of a report ({error}); make it again") from error
