"""Where tokenized and generated text is kept: $SQUAT_CACHE, $XDG_CACHE_HOME/squat or ~/.cache/squat.

The first of them that is set counts. Where it cannot be written, or there is no home folder, text is kept
in a temporary folder as long as this process lives: it is made anew each time, and a line says so once.
"""

import os
import sys
import tempfile
from functools import cache
from pathlib import Path

from squat.errors import DataError


def cache_folder(named: str | Path | None = None) -> Path:
    """The folder for files that are made once.

    Args:
        named: taken as it is; None: the default, which can be written to.

    Raises:
        DataError: neither the default nor a temporary folder can be written to.
    """
    return Path(named) if named is not None else _usable(_default())


def _default() -> Path:
    if folder := os.environ.get("SQUAT_CACHE"):
        return Path(folder).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the specification wants ignored
        base = os.path.expanduser("~/.cache")
    return Path(base) / "squat"


@cache
def _usable(folder: Path) -> Path:
    try:
        if not folder.is_absolute():
            raise OSError(0, "this user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        cause = error.strerror
    try:
        temporary = _temporary()
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({cause}), nor can a temporary folder ({error.strerror}); set "
            "SQUAT_CACHE to a folder that can"
        ) from error
    print(
        f"squat: {folder}: cannot be written ({cause}); tokenized text is kept until this command ends, and "
        "made again by the next: set SQUAT_CACHE to a folder that can",
        file=sys.stderr,
    )
    return temporary


@cache
def _temporary() -> Path:
    _KEPT.append(tempfile.TemporaryDirectory(prefix="squat-"))
    return Path(_KEPT[-1].name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Removes the folder when the process ends."""
