"""What a model's name is that of: a .gguf file for the engine, another program's, or something for PyTorch.

It is asked before any of those who read them is loaded, so it needs none of them.
"""

from __future__ import annotations

import mmap
import os

OURS = "squat.format_version"
"""The key that every file for the engine has."""


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of a .gguf file: by its ending, or by what the file begins with."""
    if str(path).lower().endswith(".gguf"):
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether this is a .gguf file that another program wrote; not where it cannot be read."""
    try:
        with (
            open(path, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return data[:4] == b"GGUF" and data.find(OURS.encode()) < 0
    except (OSError, ValueError):
        return False


def runs_in_engine(model: str) -> bool:
    """Whether a model's name is that of a file for the engine; another program's is read into PyTorch."""
    return is_gguf(model) and not is_foreign(model)
