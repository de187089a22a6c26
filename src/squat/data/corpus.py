"""A corpus is a folder of text files, or one file; reading it gives cleaned lines.

Files are read line by line, never as a whole, so a corpus may be larger than memory. Order is that
of the file names. BabyLM's files are recognised by their stems and cleaned by source (cleaning.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from squat.data.cleaning import clean, source_of
from squat.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".train", ".dev", ".test")


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
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.suffix in TEXT_SUFFIXES]
    if not files:
        folders = [entry.name for entry in entries if entry.is_dir()]
        hint = f"; name one of its folders: {', '.join(folders)}" if folders else ""
        raise DataError(f"{path}: no text file ({', '.join(TEXT_SUFFIXES)}) in this folder{hint}")
    return files


def read_corpus(
    path: str | Path,
    by_source: bool = True,
    on_read: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    """The cleaned, non-empty lines of a corpus, in the order of the files' names.

    Args:
        path: a folder of text files or a single text file, in UTF-8.
        by_source: clean BabyLM's files by source; False treats them as any other text, which is
            what a model needs that was trained on the files as they are.
        on_read: called with the size in bytes of every line read, for a progress bar.

    Raises:
        DataError: nothing there, not UTF-8, not readable, or no text in any of the files.
    """
    files = corpus_files(path)
    empty = True
    for file in files:
        source = source_of(file) if by_source else None
        for line in _lines(file):
            on_read(len(line.encode()))
            if text := clean(line, source):
                empty = False
                yield text
    if empty:
        raise DataError(f"{path}: no text in {len(files)} file(s); a corpus needs at least a line")


def _lines(file: Path) -> Iterator[str]:
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 - named in the error below
                yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 after line {number} ({error.reason}, byte "
            f"0x{error.object[error.start]:02x}); convert it, for instance with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
