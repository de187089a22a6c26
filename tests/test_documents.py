"""What documents say to type works as printed: README's blocks, at small size, and those of the tutorials."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import squat.runs
from chat_models import CHATML
from documents import ROOT, Reader, blocks_of, lay_out, lines_of
from foreign_files import keys_of, tensors_of, write
from models import some_ids, tiny_model
from real_models import smollm2
from servers import running
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.data import train_tokenizer
from squat.deploy.export import export
from squat.engine import Engine
from squat.quantization import quantize, quantizers

README = ROOT / "README.md"
FIRST_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def reader_model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The reader's own model: it knows a template, and has room for what documents ask."""
    folder = tmp_path_factory.mktemp("reader") / "mine"
    tokenizer = train_tokenizer(iter((corpus / "train/grammar.train").open()), vocab_size=400)
    tokenizer.chat_template = CHATML
    shape = {"max_position_embeddings": 512, "num_hidden_layers": 2}
    save_model(tiny_model(vocab_size=len(tokenizer), **shape), tokenizer, folder)
    return folder


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Any, reader_model: Path, corpus: Path
) -> Iterator[Reader]:
    """In a folder where things lie as documents have them; little is calibrated on."""
    lay_out(tmp_path, reader_model, corpus)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(squat.runs, "CALIBRATION_TOKENS", 32)
    monkeypatch.setattr(squat.runs, "DESCENT_SEQUENCES", 8)
    monkeypatch.setattr(squat.runs, "CALIBRATION_SEQUENCES", 8)
    # A document may add a row.
    monkeypatch.setattr(quantizers, "QUANTIZERS", dict(quantizers.QUANTIZERS))
    for name, value in {"SQUAT_CACHE": "cache", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as servers:

        def run(*arguments: str) -> None:
            if arguments[0] == "serve":
                address = servers.enter_context(running(Path(arguments[1])))
                reader.replace["http://127.0.0.1:8080"] = address
                return
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n/quit\n"))
            shell.succeed(*arguments)

        reader = Reader(run)
        yield reader


def test_the_first_screen(reader: Reader) -> None:
    """With a small file in place of the one that the second line downloads."""
    first, *_ = blocks_of(README)
    install, download, *rest = lines_of(first.text)
    assert install.startswith("pip install")
    assert "unzip" in download
    small = tiny_model(vocab_size=300, num_hidden_layers=2, max_position_embeddings=512)
    keys = {**keys_of(small), "tokenizer.chat_template": CHATML}
    write(Path(FIRST_FILE), keys, tensors_of(small))
    for line in (install, *rest):
        reader.type(line)


def test_the_rest_of_the_readme(reader: Reader) -> None:
    for block in blocks_of(README)[1:]:
        reader.run(block)
    assert Path("quantized/config.json").exists()


@pytest.mark.slow
def test_the_first_download_is_the_file_that_the_next_line_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    smollm2()  # skips where nothing can be downloaded
    download = lines_of(blocks_of(README)[0].text)[1]
    Reader(print).type(download)
    assert Path(FIRST_FILE).read_bytes()[:4] == b"GGUF"


@pytest.fixture
def model_file(reader: Reader, reader_model: Path) -> Path:
    """model.gguf, for documents that begin with one."""
    model = quantize(load_model(str(reader_model)), calibration=[some_ids(4, 32)]).eval()
    export(model, load_tokenizer(str(reader_model)), "model", "model.gguf")
    return Path("model.gguf")


@pytest.mark.parametrize(
    "name",
    ["huggingface", "command-line", "tutorials/your-model", "tutorials/train", "tutorials/report"],
)
def test_a_document(reader: Reader, name: str) -> None:
    reader.read(ROOT / f"docs/{name}.md")


@pytest.mark.parametrize("name", ["tutorials/serve", "tutorials/extend"])
def test_a_document_about_a_file(reader: Reader, model_file: Path, name: str) -> None:
    reader.read(ROOT / f"docs/{name}.md")


@pytest.mark.slow
def test_the_embedded_engine(reader: Reader, model_file: Path) -> None:
    reader.read(ROOT / "docs/tutorials/embed.md")
    told = subprocess.run(["./tell", model_file, "Once"], capture_output=True, check=True)
    sampling: Any = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
    assert (
        told.stdout.decode(errors="replace")
        == f"Once{Engine(model_file).generate('Once', 32, **sampling)}\n"
    )


def test_every_tutorial_is_run() -> None:
    there = {file.stem for file in (ROOT / "docs/tutorials").glob("*.md")}
    assert there == {"your-model", "train", "report", "serve", "extend", "embed"}
