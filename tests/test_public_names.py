"""Public names survive every order of imports."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import squat
from squat import _native

# Torch and transformers are loaded once; then a process of its own for each module that comes first.
_SCRIPT = """
import importlib, os, sys
import torch, transformers, rich.table, lm_eval.api.model
from transformers import AutoModelForCausalLM, Trainer
for first in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(first)
            squat = importlib.import_module("squat")
            assert {name for name in squat.__all__ if not callable(getattr(squat, name))} == set()
            assert squat.quantize.__module__ == "squat.quantization.hf"
        except BaseException as error:
            print(first, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


def survive(modules):
    command = [sys.executable, "-c", _SCRIPT, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def all_modules(packages_only):
    found = pkgutil.walk_packages(squat.__path__, "squat.")
    return [m.name for m in found if m.ispkg or (not packages_only and m.name != "squat.__main__")]


@pytest.mark.slow
def test_whatever_package_is_imported_first():
    modules = all_modules(packages_only=True)
    assert "squat.architectures" in modules
    survive(modules)


@pytest.mark.slow
def test_whatever_module_is_imported_first():
    survive(all_modules(packages_only=False))


def test_everything_is_of_one_version():
    root = Path(__file__).parents[1]
    places = {
        "pyproject.toml": r'^version = "(.*)"',
        "CMakeLists.txt": r"^project\(squat VERSION (\S+)",
        "native/include/squat.h": r'^#define SQUAT_VERSION "(.*)"',
        "CHANGELOG.md": r"^## (\S+)",
    }
    found = {
        file: re.search(pattern, (root / file).read_text(), re.MULTILINE)[1]
        for file, pattern in places.items()
    }
    assert {*found.values(), _native.version()} == {squat.__version__}, found
