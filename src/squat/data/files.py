"""Files appear complete or not at all: written under a temporary name, then renamed.

The cache files of this package are made by whichever process comes first; the others wait for it.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from squat.errors import DataError


@contextmanager
def writing(file: Path) -> Iterator[IO[bytes]]:
    """A binary stream that becomes `file` when the block ends; after an error nothing is left.

    Raises:
        DataError: the name is a folder's, the disk is full or the folder cannot be written to.
    """
    check_no_folder(file)
    with readable_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
            os.chmod(name, 0o644)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise


def check_no_folder(file: Path) -> None:
    """Refuse a folder where a file is to be written, before the work that would be lost.

    Raises:
        DataError: it is one.
    """
    if file.is_dir():
        raise DataError(f"{file}: is a folder; name a file")


@contextmanager
def once(file: Path) -> Iterator[bool]:
    """Whether `file` still has to be made, under a lock: of several processes one makes it.

    Raises:
        DataError: the folder cannot be written to.
    """
    with readable_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_name(f".{file.name}.lock"))
        lock.acquire()
    try:
        yield not file.exists()
    finally:
        lock.release()


@contextmanager
def readable_errors(file: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `file` into one line that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error
