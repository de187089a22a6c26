"""A corpus is a folder of text files, or one file; reading it gives cleaned lines.

Files are read bit by bit, never as a whole, so a corpus may be larger than memory. Order is that
of the file names. BabyLM's files are recognised by their stems and cleaned by source (cleaning.py).

What a file is, its suffix says: lines of text by default; .jsonl has an object on each line, .parquet and
.arrow (what the datasets library saves) are tables, of which one field holds the text. Text and .jsonl
may be compressed (.gz). A text of several lines gives several.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from squat.data.cleaning import clean, source_of
from squat.errors import DataError
from squat.unicode import broken_character

FIELD = "text"
"""The field of .jsonl, .parquet and .arrow that is read, unless another one is named."""

_LINES = (".txt", ".md", ".train", ".dev", ".test", ".jsonl")
_TABLES = (".parquet", ".arrow")
TEXT_SUFFIXES = (*_LINES, *(f"{suffix}.gz" for suffix in _LINES), *_TABLES)

OnRead = Callable[[int], object]
"""Called with the size in bytes of what has been read of a file since the last call."""


def corpus_files(path: str | Path) -> list[Path]:
    """The text files of a corpus, sorted by name: the folder's own, not those of its subfolders.

    Subfolders are left alone because they usually hold other splits (train, dev) of the same text.

    Raises:
        DataError: the path does not exist, or the folder holds no text file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder of text")
    if (path / "state.json").is_file():
        return _saved_dataset(path)
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.name.endswith(TEXT_SUFFIXES)]
    if not files:
        folders = [entry.name for entry in entries if entry.is_dir()]
        hint = f"; name one of its folders: {', '.join(folders)}" if folders else ""
        raise DataError(f"{path}: no text file ({', '.join(TEXT_SUFFIXES)}) in this folder{hint}")
    return files


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of what `Dataset.save_to_disk` left; others beside them may be leftovers of its cache."""
    file = folder / "state.json"
    try:
        names = [part["filename"] for part in json.loads(file.read_text("utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: not the state of a saved dataset ({type(error).__name__}: {error}); save it again"
        ) from None
    return [folder / name for name in names]


def read_corpus(
    path: str | Path,
    by_source: bool = True,
    field: str = FIELD,
    on_read: OnRead = lambda size: None,
) -> Iterator[str]:
    """The cleaned, non-empty lines of a corpus, in the order of the files' names.

    Args:
        path: a folder of text files or a single text file, in UTF-8.
        by_source: clean BabyLM's files by source; False treats them as any other text, which is
            what a model needs that was trained on the files as they are.
        field: holds the text in .jsonl, .parquet and .arrow.
        on_read: called with the size in bytes of what was read since the last call.

    Raises:
        DataError: nothing there, not UTF-8, not readable, no such field, a library that is missing, or no
            text in any of the files.
    """
    files = corpus_files(path)
    empty = True
    for file in files:
        source = source_of(file) if by_source else None
        for text in _texts(file, field, on_read):
            for line in text.split("\n"):
                if cleaned := clean(line, source):
                    empty = False
                    yield cleaned
    if empty:
        raise DataError(f"{path}: no text in {len(files)} file(s); a corpus needs at least a line")


def _texts(file: Path, field: str, on_read: OnRead) -> Iterator[str]:
    if file.suffix in _TABLES:
        return _cells(file, field, on_read)
    lines = _lines(file, on_read)
    return _members(file, field, lines) if ".jsonl" in file.suffixes[-2:] else lines


def _lines(file: Path, on_read: OnRead) -> Iterator[str]:
    number = 0
    try:
        with file.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            known = 0
            for number, line in enumerate(io.TextIOWrapper(stream, "utf-8-sig"), start=1):  # noqa: B007 - named below
                on_read(raw.tell() - known)
                known = raw.tell()
                yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 after line {number} ({error.reason}, byte "
            f"0x{error.object[error.start]:02x}); convert it, for instance with iconv -t UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file}: not a complete gzip file after line {number} ({error}); copy or compress it again"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _members(file: Path, field: str, lines: Iterator[str]) -> Iterator[str]:
    """One member of the object on each line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); correct or delete the line") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON {type(record).__name__}, not an object with a field {field!r}; correct or "
                "delete the line"
            )
        yield _text_of(record, field, where)


def _cells(file: Path, field: str, on_read: OnRead) -> Iterator[str]:
    """One column of a table."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise DataError(
            f"{file}: reading {file.suffix} needs pyarrow: pip install pyarrow; or save the text as .jsonl"
        ) from None
    row = 0
    try:
        if file.suffix == ".parquet":
            table = parquet.ParquetFile(file)
            _check_column(file, field, table.schema_arrow.names)
            batches = table.iter_batches(columns=[field])
        else:
            batches = ipc.open_stream(pyarrow.memory_map(str(file)))
            _check_column(file, field, batches.schema.names)
        for batch in batches:
            for value in batch.column(field).to_pylist():
                row += 1
                yield _text_of({field: value}, field, f"{file}: row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())
        raise DataError(
            f"{file}: not a complete {file.suffix} file after row {row} ({cause}); copy or save it again"
        ) from error
    on_read(file.stat().st_size)


def _check_column(file: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise DataError(f"{file}: {_no_field(field, names)}")


def _no_field(field: str, names: list[str]) -> str:
    return (
        f"no field {field!r}, but {', '.join(map(repr, names)) or 'none at all'}; name the one with the text "
        "as data.field in a recipe, or call it that"
    )


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    """The text in a field; an empty one where it is null."""
    if field not in record:
        raise DataError(f"{where}: {_no_field(field, list(record))}")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is a {type(text).__name__}, not a text")
    if problem := broken_character(text):
        raise DataError(f"{where}: field {field!r}: {problem}")
    return text
