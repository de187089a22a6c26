"""The wheel: what is in it, and that a .gguf file runs where nothing else is installed, torch neither."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from models import some_ids
from squat.checkpoints import load_model, load_tokenizer
from squat.deploy.export import export
from squat.engine import Engine
from squat.quantization import quantize

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(*command, status=0, **variables):
    """What a program prints, and on standard error; it ends with this status."""
    command = [str(part) for part in command]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, cwd=ROOT
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def build(source, folder):
    """The wheel of a folder with the project's files."""
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, SOURCE_DATE_EPOCH="1700000000")
    (wheel,) = folder.glob("squat-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory, wheel):
    """The programs of a fresh environment in which only the wheel was installed."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True)
    programs = folder / "env" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel)
    return programs


@pytest.fixture(scope="module")
def file(tmp_path_factory, model):
    quantized = quantize(load_model(str(model)), calibration=[some_ids(4, 32)]).eval()
    path = tmp_path_factory.mktemp("file") / "tiny.gguf"
    export(quantized, load_tokenizer(str(model)), "tiny", path)
    return path


def tracked(*folders):
    return run("git", "ls-files", *folders)[0].splitlines()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    (library,) = [name for name in names if name.startswith("squat/_native.") and "pyi" not in name]
    version = wheel.name.split("-")[1]
    facts = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert names == {
        library,
        *(name.removeprefix("src/") for name in tracked("src/squat")),
        *(f"squat-{version}.dist-info/{name}" for name in facts),
    }


def test_two_builds_in_two_places_are_the_same_bytes(tmp_path, wheel):
    for name in tracked():
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    assert build(tmp_path / "copy", tmp_path).read_bytes() == wheel.read_bytes()


def test_a_file_runs_with_the_wheel_alone(clean, file):
    packages = {p["name"] for p in json.loads(run(clean / "pip", "list", "--format=json")[0])}
    assert "squat" in packages
    assert not packages & {"torch", "transformers", "gguf", "matplotlib"}
    expected = Engine(str(file)).generate("The dog", max_new_tokens=12)
    printed, _ = run(clean / "squat", "generate", file, "The dog", "--max-new-tokens", 12)
    assert printed.strip() == ("The dog" + expected).strip()
    program = f"from squat import Engine; print(Engine({str(file)!r}).generate('The dog', max_new_tokens=12))"
    assert run(clean / "python", "-c", program)[0].strip() == expected.strip()
    run(clean / "squat", "info")


@pytest.mark.parametrize("command", ["quantize", "export", "train", "eval", "bench"])
def test_what_needs_more_says_what_to_install(clean, command):
    data = ("--task", "perplexity", "--data", ROOT / "README.md")
    arguments = {"train": ["x.yaml"], "eval": ["x", *data], "bench": []}
    _, error = run(clean / "squat", command, *arguments.get(command, ["x", "y"]), status=2)
    assert error.strip().endswith("pip install 'squat[train]'")
    assert "Traceback" not in error


def test_so_does_serve(clean, file):
    _, error = run(clean / "squat", "serve", file, status=2)
    assert error.strip().endswith("pip install 'squat[serve]'")


def test_so_do_the_names_of_the_training_half(clean):
    _, error = run(clean / "python", "-c", "import squat; squat.quantize", status=1)
    assert "squat.quantize: " in error
    assert error.strip().endswith("pip install 'squat[train]'")
