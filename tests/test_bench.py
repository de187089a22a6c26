"""`squat bench`: what it measures and says, never how long anything takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from squat.bench import SHAPES, Settings, run, write_random_file
from squat.bench.measure import random_tokens
from squat.bench.shapes import random_model
from squat.cli import app, main
from squat.engine import Engine

QUICK = ("--prompt", "6", "--generate", "2", "--rounds", "2")


def bench(*arguments: object) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments), *QUICK, "--json", "-"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """What the command says to bad input: one line on standard error, status 2."""
    monkeypatch.setattr(sys, "argv", ["squat", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("squat: ")
    assert error.count("\n") == 1
    return error


def test_json_of_a_shape() -> None:
    rows = bench("--shape", "llama-6m", "--threads", 1, "--threads", 2, "--isa", "reference")
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert row["shape"] == "llama-6m"
        assert row["isa"] == "reference"
        assert (row["weight_bits"], row["head_bits"], row["activations"]) == (4, 8, "a8")
        assert row["wide_share"] is None
        assert row["model_bytes"] > row["weight_bytes"] > 0
        assert row["load_seconds"] > 0
        for phase in ("prefill", "decode"):
            assert len(row[f"{phase}_rounds"]) == 2
            assert row[f"{phase}_tokens_per_s"] == pytest.approx(np.median(row[f"{phase}_rounds"]))
            assert row[f"{phase}_tokens_per_s"] > 0


def test_a_file_is_described_by_itself(tmp_path: Path) -> None:
    write_random_file(tmp_path / "m.gguf", "llama-6m", "a4", weight_bits=8, head_bits=4)
    (row,) = bench(tmp_path / "m.gguf")
    assert (row["shape"], row["activations"]) == ("llama-6m", "a4")
    assert (row["weight_bits"], row["head_bits"]) == (8, 4)
    assert row["model_bytes"] == (tmp_path / "m.gguf").stat().st_size


@pytest.mark.parametrize("hadamard", ["all", "none"])
def test_what_squat_quantize_makes_is_measured(shell, model, corpus, tmp_path, hadamard) -> None:
    quantized, file = tmp_path / "quantized", tmp_path / "tied.gguf"
    options = ("--data", corpus / "train", "--weights", "nearest", "--hadamard", hadamard)
    shell.succeed("quantize", model, quantized, *options)
    shell.succeed("export", quantized, file)
    (row,) = bench(file)
    assert (row["weight_bits"], row["head_bits"]) == (4, 8)


def test_files_and_tables_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["bench", "--shape", "llama-6m", *QUICK, "--json", str(out)])
    assert result.exit_code == 0
    assert "llama-6m" in result.stdout
    assert json.loads(out.read_text())[0]["prompt"] == 6


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_share_of_wide_tokens_is_real(tmp_path: Path, share: float) -> None:
    write_random_file(tmp_path / "m.gguf", "llama-6m", f"4:8={share}", tokens=96)
    engine = Engine(tmp_path / "m.gguf", context=96)
    engine.prefill(random_tokens(engine.info.vocab_size, 96))
    assert np.mean(engine.wide_share) == pytest.approx(share, abs=0.05)
    assert all(abs(found - share) < 0.2 for found in engine.wide_share)


def test_realised_share_is_reported() -> None:
    (row,) = run(
        Settings(shape="llama-6m", activations=["4:8=0.5"], prompt=64, generate=8, rounds=1)
    )
    assert row.activations == "4:8=0.5"
    assert row.wide_share == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ["llama-6m", "llama-20m"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    model = random_model(name)
    assert SHAPES[name].parameters == sum(m.codes.size for m in model.matrices.values())


def test_the_paper_s_shapes() -> None:
    """Sizes of the paper's Table IV: 110.6 MB of fp16 weights; GPT-2 with a context of 1024."""
    assert SHAPES["llama-58m"].parameters == pytest.approx(58.3e6, rel=0.01)
    assert SHAPES["gpt2-97m"].parameters == pytest.approx(98e6, rel=0.01)
    assert SHAPES["llama-58m"].prefill_macs(128) == pytest.approx(5.51e9, rel=0.001)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "llama-7b"), "llama-58m"),
        ((), "--shape"),
        (("m.gguf", "--shape", "llama-6m"), "--shape"),
        (("--shape", "llama-6m", "--activations", "a5"), "4:8=SHARE"),
        (("--shape", "llama-6m", "--activations", "4:8"), "4:8=SHARE"),
        (("--shape", "llama-6m", "--activations", "4:8=1.5"), "4:8=SHARE"),
        (("--shape", "llama-6m", "--activations", "4:8=nan"), "4:8=SHARE"),
        (("--shape", "llama-6m", "--weight-bits", "5"), "weight_bits: 5"),
        (("--shape", "llama-6m", "--head-bits", "2"), "head_bits: 2"),
        (("--shape", "llama-6m", "--isa", "sse9"), "SQUAT_ISA=sse9"),
        (("--shape", "llama-6m", "--prompt", "0"), "prompt: 0"),
        (("--shape", "llama-6m", "--generate", "-1"), "generate: -1"),
        (("--shape", "llama-6m", "--rounds", "0"), "rounds: 0"),
        (("--shape", "llama-6m", "--prompt", "100000"), "context"),
        (("--shape", "llama-6m", "--threads", "-1"), "threads: -1"),
        (("missing.gguf",), "missing.gguf"),
        (("missing.gguf", "--activations", "a4"), "activations"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    assert said in refuse(monkeypatch, capsys, *arguments)


def test_an_isa_that_the_cpu_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from squat import _native

    lacking = [k["isa"] for k in _native.kernels() if not k["runs_here"]]
    if not lacking:
        pytest.skip("this CPU runs every kernel that is compiled")
    assert lacking[0] in refuse(
        monkeypatch, capsys, "--shape", "llama-6m", "--isa", lacking[0], *QUICK
    )


def test_profile() -> None:
    rows = bench("--shape", "llama-6m", "--profile")
    for phase in ("prefill", "decode"):
        steps = [row for row in rows if row["phase"] == phase]
        assert sum(row["share"] for row in steps) == pytest.approx(1)
        (products,) = (row for row in steps if row["step"] == "q, k, v")
        assert products["gmacs"] > 0
        assert products["gbs"] > 0
