"""`squat sweep`: one table of several runs, that resumes, and goes on when one fails."""

import csv
import json
import shutil
from pathlib import Path
from statistics import stdev

import pytest
import yaml

import squat.sweeps
from squat.errors import ConfigError
from squat.recipes import read_sweep


def write_sweep(folder, model, corpus, **changes):
    content = {
        "output": str(folder / "runs"),
        "base": {
            "model": str(model),
            "data": {
                "train": str(corpus / "train"),
                "sequence_length": 16,
                "cache": str(folder / "cache"),
            },
            "quantize": {"activation_bits": 4},
            "training": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "log_every": 1},
        },
        "runs": {
            "a4": None,
            "a6": {"quantize": {"activation_bits": 6}},
        },
        "evaluate": {
            "text": str(corpus / "dev"),
            "sequence_length": 32,
            "pairs": [str(corpus / "pairs")],
            "limit": 5,
        },
        **changes,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def table(folder):
    return json.loads((folder / "runs/table.json").read_text())


def test_a_sweep_trains_measures_and_tabulates_every_run(shell, tmp_path, model, corpus):
    out = shell.succeed("sweep", write_sweep(tmp_path, model, corpus, seeds=[0, 1]))
    cells = (tmp_path / "runs/table.md").read_text().replace("|", " ").replace("---", " ").split()
    assert set(cells) <= set(out.replace("│", " ").replace("┃", " ").replace(": ", " ").split())
    rows = {(row["run"], row["seed"]): row for row in table(tmp_path)["rows"]}
    assert list(rows) == [("full-precision", None), ("a4", 0), ("a4", 1), ("a6", 0), ("a6", 1)]
    assert all(row["status"] == "done" for row in rows.values())
    # The engine has no 6-bit activations; everything it has is measured through it.
    assert [row["measured_in"] for row in rows.values()] == [
        "PyTorch", "engine", "engine", "PyTorch", "PyTorch",
    ]  # fmt: skip
    losses = [rows["a4", seed]["perplexity"]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    summary = table(tmp_path)["summary"]["a4"]["loss"]
    assert summary["mean"] == pytest.approx(sum(losses) / 2)
    assert summary["standard_deviation"] == pytest.approx(stdev(losses))
    assert (
        f"{sum(losses) / 2:.4f} ± {stdev(losses):.4f}" in (tmp_path / "runs/table.md").read_text()
    )
    with (tmp_path / "runs/table.csv").open() as file:
        lines = list(csv.DictReader(file))
    base = float(lines[0]["loss"])
    assert float(lines[1]["added"]) == pytest.approx(losses[0] - base)

    # A number of the table can be had again from the run's own files.
    again = tmp_path / "again.json"
    shell.succeed(
        "eval", tmp_path / "runs/a4/seed-1/model.gguf", "--task", "perplexity", "--data",
        corpus / "dev", "--sequence-length", 32, "--json", again,
    )  # fmt: skip
    assert json.loads(again.read_text())["loss"] == losses[1]


@pytest.mark.slow
def test_a_sweep_resumes_without_doing_anything_twice(shell, tmp_path, model, corpus, monkeypatch):
    trained, asked = [], []
    train, run_task = squat.sweeps.train, squat.sweeps.run_task
    monkeypatch.setattr(squat.sweeps, "train", lambda r, m: trained.append(r.output) or train(r, m))

    def interrupted(task, model, settings):
        asked.append(task)
        if len(asked) == 4:  # the second task of the first run
            raise KeyboardInterrupt
        return run_task(task, model, settings)

    monkeypatch.setattr(squat.sweeps, "run_task", interrupted)
    folder = write_sweep(tmp_path, model, corpus)
    assert shell.run("sweep", folder)[0] == 130
    assert [row["status"] for row in table(folder)["rows"]] == ["done", "to do", "to do"]
    shell.succeed("sweep", folder)
    assert asked == ["perplexity", "blimp"] * 2 + ["blimp"] + ["perplexity", "blimp"]
    assert len(trained) == 3  # the first one twice, the second time it is there already
    before = (tmp_path / "runs/table.json").read_text()
    shell.succeed("sweep", folder)
    assert (tmp_path / "runs/table.json").read_text() == before
    assert (len(trained), len(asked)) == (3, 7)
    # Other questions to the same models are asked; nothing is trained again.
    settings = {"text": str(corpus / "dev"), "sequence_length": 16}
    shell.succeed("sweep", write_sweep(tmp_path, model, corpus, evaluate=settings))
    assert asked[7:] == ["perplexity"] * 3


def test_a_run_that_fails_is_reported_and_the_others_go_on(shell, tmp_path, model, corpus):
    runs = {"broken": {"data": {"sequence_length": 10**6}}, "a4": None}
    folder = write_sweep(tmp_path, model, corpus, runs=runs)
    status, out, _ = shell.run("sweep", folder)
    assert status == 1
    rows = table(folder)["rows"]
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "sequence_length 1000000" in rows[1]["problem"]
    assert "sequence_length 1000000" in out
    # Put right, it runs, and the others are not run again.
    runs["broken"] = None
    done = (tmp_path / "runs/a4/seed-0/measured.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "runs/broken")
    shell.succeed("sweep", write_sweep(tmp_path, model, corpus, runs=runs))
    assert (tmp_path / "runs/a4/seed-0/measured.json").stat().st_mtime_ns == done


def test_one_run_can_be_named(shell, tmp_path, model, corpus):
    folder = write_sweep(tmp_path, model, corpus)
    shell.succeed("sweep", folder, "--only", "a4")
    assert [row["status"] for row in table(folder)["rows"]] == ["to do", "done", "to do"]
    assert "no run 'a5'; there are full-precision, a4, a6" in shell.refuse(
        "sweep", folder, "--only", "a5"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"x": {"quantize": {"methd": "lsq"}}}}, "18: runs.x.quantize.methd: no such"),
        ({"runs": {"x": {"training": {"steps": 0}}}}, "18: runs.x.training.steps: .*greater"),
        ({"base": {"model": "/no/such"}}, "3: base.model: /no/such is neither"),
        ({"base": {"output": "x"}}, "3: base.output: the sweep names the folder"),
        ({"runs": {"a/b": None}}, "runs.a/b.*: String should match"),
        ({"runs": {}}, "runs: .*at least 1 item"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"evaluate": {}}, "evaluate: give text, or pairs, or both"),
        ({"evaluate": {"text": "/no/such"}}, "evaluate.text: /no/such does not exist"),
        ({"tasks": []}, "tasks: no such key; known here are output, base, runs"),
    ],
)
def test_a_wrong_sweep_is_refused_with_its_line(tmp_path, model, corpus, changes, message):
    folder = write_sweep(tmp_path, model, corpus, **changes)
    with pytest.raises(ConfigError, match=rf"sweep\.yaml:(\d+: )?{message}"):
        read_sweep(folder / "sweep.yaml")


def test_a_folder_without_a_sweep_is_refused(shell, tmp_path):
    assert "sweep.yaml: cannot be read" in shell.refuse("sweep", tmp_path)


SMALL = {
    "llama-58m": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    "gpt2-97m": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_recipes_of_paper_scale_run_in_stretches(
    shell, tmp_path, model, corpus, monkeypatch, name
):
    """As they stand in recipes/, with smaller models and fewer steps."""
    data = tmp_path / "data"
    shutil.copytree(corpus, data / "babylm")
    shutil.copytree(corpus / "pairs", data / "blimp")
    (data / "blimp_supplement_sample").mkdir()
    some = next((corpus / "pairs").glob("*.jsonl"))
    shutil.copy(some, data / "blimp_supplement_sample/other.jsonl")
    (tmp_path / "models").mkdir()
    shutil.copy(model / "tokenizer.json", tmp_path / "models/babylm-tokenizer-16000.json")
    monkeypatch.setenv("SQUAT_DATA", str(data))
    monkeypatch.chdir(tmp_path)

    short = {"epochs": None, "steps": 2, "batch_size": 4, "compile": False}
    recipes = Path(__file__).parent.parent / "recipes" / name
    pretraining = yaml.safe_load((recipes / "pretrain.yaml").read_text())
    pretraining["model"] |= SMALL[name]
    pretraining["training"] |= short
    pretraining["data"]["cache"] = "cache"
    sweep = yaml.safe_load((recipes / "sweep.yaml").read_text())
    sweep["base"]["training"] |= short
    sweep["base"]["data"]["cache"] = "cache"
    sweep["evaluate"]["limit"] = 3
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(pretraining))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))

    assert shell.run("pretrain", "pretrain.yaml", "--max-minutes", 0)[0] == 3
    shell.succeed("pretrain", "pretrain.yaml")
    assert shell.run("sweep", ".", "--max-minutes", 0)[0] == 3  # after the first run's first step
    shell.succeed("sweep", ".")
    table = json.loads((tmp_path / f"runs/{name}/quantized/table.json").read_text())
    assert [row["run"] for row in table["rows"]] == ["full-precision", *sweep["runs"]]
    assert all(row["status"] == "done" for row in table["rows"])
    assert {row["measured_in"] for row in table["rows"][1:]} == {"engine"}
