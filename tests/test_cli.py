"""The command line, end to end on small real input: train, resume, evaluate, generate, refuse."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command

import squat
from models import tiny_model
from squat import info
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.cli import app
from squat.demo import next_command
from squat.engine import Engine, hash_of
from squat.quantization import SquatConfig
from squat.quantization.modules import QuantizedWeight
from squat.recipes import TrainRecipe, read_recipe
from squat.runs import advice, train


def recipe(folder, model, corpus, **changes):
    content = {
        "output": str(folder / "run"),
        "model": str(model),
        "data": {"train": str(corpus / "train"), "sequence_length": 16, "cache": str(folder / "c")},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "save_every": 2,
            "log_every": 2,
            "warmup_steps": 1,
        },
        **changes,
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, corpus):
    """A run from beginning to end, to compare with: its folder holds `recipe.yaml` and `run`."""
    folder = tmp_path_factory.mktemp("whole")
    train(read_recipe(recipe(folder, model, corpus), TrainRecipe))
    return folder


def log_of(folder):
    return json.loads((folder / "run/log.json").read_text())["log"]


def test_train_evaluate_and_generate(shell, tmp_path, model, corpus, whole):
    file, run = whole / "recipe.yaml", whole / "run"
    trained = load_model(str(run / "model"))
    assert trained.config.quantization_config.weight_bits == 4
    assert json.loads((run / "log.json").read_text())["log"][-1]["step"] == 4
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "run/model" in shell.succeed("train", file).replace(
        "\n", ""
    )  # done: says where, at once

    result = shell.succeed(
        "eval",
        run / "model",
        "--task",
        "blimp",
        "--data",
        corpus / "pairs",
        "--limit",
        5,
        "--json",
        "-",
    )
    assert 0 <= json.loads(result)["average_paradigms"] <= 1
    out = tmp_path / "perplexity.json"
    shell.succeed(
        "eval",
        run / "model",
        "--task",
        "perplexity",
        "--data",
        corpus / "dev",
        "--json",
        out,
        "--sequence-length",
        32,
    )
    assert json.loads(out.read_text())["loss"] > 0
    text = shell.succeed("generate", run / "model", "The girl", "--max-new-tokens", 4)
    assert text.startswith("The girl")

    file = tmp_path / "tiny.gguf"
    shell.succeed("export", run / "model", file)
    same = shell.succeed("parity", run / "model", file, "--data", corpus / "dev", "--tokens", 200,
                         "--sequence-length", 32)  # fmt: skip
    assert "NO" not in same
    assert shell.succeed("generate", file, "The girl", "--max-new-tokens", 4) == text
    shell.succeed(
        "eval", file, "--task", "perplexity", "--data", corpus / "dev", "--json", tmp_path / "e.json",
        "--sequence-length", 32,
    )  # fmt: skip
    through_engine = json.loads((tmp_path / "e.json").read_text())
    assert through_engine["loss"] == pytest.approx(json.loads(out.read_text())["loss"], abs=1e-6)


def test_an_interrupted_run_goes_on_and_ends_the_same(shell, tmp_path, model, corpus, whole):
    broken = tmp_path / "broken"
    broken.mkdir()
    shell.succeed("train", recipe(broken, model, corpus))
    # As if the second had been killed while it wrote its last checkpoint.
    shutil.rmtree(broken / "run/model")
    (broken / "run/checkpoints/checkpoint-4/trainer_state.json").unlink()
    shell.succeed("train", recipe(broken, model, corpus))
    states = [load_model(str(f / "run/model")).state_dict() for f in (whole, broken)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_in_stretches_ends_the_same(shell, tmp_path, model, corpus, whole):
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    file = recipe(pieces, model, corpus)
    for step in (1, 2, 3):
        status, _, error = shell.run("train", file, "--max-minutes", 0)
        assert status == 3
        assert f"time is up after step {step} of 4" in " ".join(error.split())
    shell.succeed("train", file, "--max-minutes", 60)
    states = [load_model(str(f / "run/model")).state_dict() for f in (whole, pieces)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_from_a_file_of_tokens_is_training_from_the_text(
    shell, tmp_path, model, corpus, whole
):
    ids = tmp_path / "ids"
    ids.mkdir()
    out = shell.succeed("tokenize", corpus / "train", model, tmp_path / "tokens")
    assert "tokens.uint16" in out.replace("\n", "")
    data = {"train": str(tmp_path / "tokens.uint16"), "sequence_length": 16}
    shell.succeed("train", recipe(ids, model, corpus, data=data))
    assert log_of(ids) == log_of(whole)

    (tmp_path / "tokens.uint16").write_bytes(b"\xff\xff" * 100)
    (tmp_path / "other").mkdir()
    message = shell.refuse("train", recipe(tmp_path / "other", model, corpus, data=data))
    assert "holds token id 65535" in message


def test_training_from_a_field_is_training_from_the_text(shell, tmp_path, model, corpus, whole):
    (source,) = (corpus / "train").iterdir()
    stories = [{"story": line} for line in source.read_text().splitlines()]
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, stories)))
    data = {
        "train": str(tmp_path / "stories.jsonl"),
        "sequence_length": 16,
        "cache": str(tmp_path / "c"),
    }
    (field := tmp_path / "field").mkdir()
    shell.succeed("train", recipe(field, model, corpus, data={**data, "field": "story"}))
    assert log_of(field) == log_of(whole)
    (tmp_path / "wrong").mkdir()
    message = shell.refuse("train", recipe(tmp_path / "wrong", model, corpus, data=data))
    assert "stories.jsonl:1: no field 'text', but 'story'; name the one" in message


def test_pretraining_and_data_free_training(shell, tmp_path, corpus):
    content = {
        "output": str(tmp_path / "pretrained"),
        "model": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "tokenizer": {"vocab_size": 300},
        "data": {
            "train": str(corpus / "train"),
            "sequence_length": 16,
            "cache": str(tmp_path / "c"),
        },
        "training": {"epochs": 0.05, "batch_size": 4},
    }
    file = tmp_path / "pretrain.yaml"
    file.write_text(json.dumps(content))
    shell.succeed("pretrain", file)
    assert len(load_tokenizer(str(tmp_path / "pretrained/model"))) == 300
    data = {"generate": {"tokens": 200}, "sequence_length": 16, "cache": str(tmp_path / "c")}
    shell.succeed("train", recipe(tmp_path, tmp_path / "pretrained/model", corpus, data=data))


def test_quantizing_without_training(shell, tmp_path, model, corpus):
    out = tmp_path / "ptq"
    said = shell.succeed("quantize", model, out, "--activation-bits", 4, "--data", corpus / "train")
    assert "KL to the original 0." in said
    assert "warning" not in said
    assert load_model(str(out)).config.quantization_config.activation_bits == 4
    narrow = ("--activation-bits", 8, "--cache-bits", 4, "--weights", "nearest")
    shell.succeed("quantize", model, out, *narrow, "--data", corpus / "train")
    made = load_model(str(out)).config.quantization_config
    assert made.site_bits == {"k": 4, "v": 4}
    assert "| keys and values | 4 bits |" in (out / "README.md").read_text()
    bits = ("--weight-bits", 2, "--activation-bits", 2, "--weights", "nearest")
    said = shell.succeed("quantize", model, out, *bits, "--data", corpus / "train")
    assert "warning: little is left of the model; --weights descent would help" in said
    (tmp_path / "short.txt").write_text("The cat sat on the mat. " * 12)
    message = shell.refuse("quantize", model, out, "--data", tmp_path / "short.txt")
    assert "holds 1 window of 64 tokens; give at least two" in message
    assert "activation_bits: 9 bits" in shell.refuse("quantize", model, out, "--activation-bits", 9)
    assert "site_bits.k: 9 bits" in shell.refuse("quantize", model, out, "--cache-bits", 9)


def test_info_says_which_kernel_runs(shell):
    assert "matmul_a8_w4" in shell.succeed("info").replace("\n", "")


def test_info_says_what_is_missing(shell, monkeypatch):
    """As JSON, which a bug report can carry."""

    def version_of(package):
        if package == "uvicorn":
            raise PackageNotFoundError
        return version(package)

    monkeypatch.setattr(info, "version", version_of)
    found = json.loads(shell.succeed("info", "--json", "-"))
    assert found["extra serve"] == "lacks uvicorn: pip install 'squat[serve]'"
    assert found["extra train"].startswith("torch ")
    assert "a8 w4" in found


def test_bad_input_is_one_line_and_status_2(shell, tmp_path, model, corpus):
    assert "recipe.yaml" in shell.refuse("train", tmp_path / "recipe.yaml")
    assert "no such file or folder" in shell.refuse(
        "eval", model, "--task", "perplexity", "--data", tmp_path / "none"
    )
    assert "'glu' does not exist" in shell.refuse("eval", model, "--task", "glu", "--data", corpus)
    assert "no model could be loaded" in shell.refuse(
        "eval", tmp_path / "none", "--task", "blimp", "--data", corpus / "pairs"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text(" \n\n")
    assert "no text in" in shell.refuse(
        "eval", model, "--task", "perplexity", "--data", tmp_path / "empty"
    )
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/x.jsonl").write_text('{"sentence_good": "A."}\n')
    message = shell.refuse("eval", model, "--task", "blimp", "--data", tmp_path / "pairs")
    assert "x.jsonl" in message
    assert "sentence_bad" in message


@pytest.mark.parametrize(
    ("settings", "weights", "setting"),
    [
        ({"weight_steps": "tensor", "token_steps": "static"}, "nearest", "--weight-steps row"),
        ({"token_steps": "static", "activation_bits": 8}, "descent", "--token-steps peak"),
        ({"hadamard": ["mlp_mid"]}, "descent", "--hadamard all"),
        ({"activation_bits": 8}, "nearest", "--weights descent"),
        ({"activation_levels": "uniform"}, "descent", "--activation-levels table"),
        ({"activation_bits": 4}, "descent", "--activation-bits 8"),
        ({"activation_bits": 8}, "descent", "squat train"),
    ],
)
def test_the_advice_is_the_setting_that_is_missing(settings, weights, setting):
    assert advice(SquatConfig(**settings), weights) == setting


def test_a_checkpoint_without_all_of_its_weights_is_refused(shell, tmp_path, model, corpus):
    quantized = tmp_path / "quantized"
    shell.succeed("quantize", model, quantized, "--data", corpus / "train")
    file = quantized / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.input_quantizer.by_width.8.log_step"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = shell.refuse("generate", quantized, "The")
    assert "lack model.layers.0.mlp.input_quantizer.by_width.8.log_step (1 missing" in message


def test_a_checkpoint_cut_short_is_named(shell, tmp_path, model, corpus):
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = shell.refuse("generate", cut, "The")
    assert "model.safetensors" in message
    assert "not a complete" in message


def test_a_tokenizer_that_does_not_match_is_refused(shell, tmp_path, model, corpus):
    tokenizer = load_tokenizer(str(model))
    save_model(tiny_model(vocab_size=97), tokenizer, tmp_path / "mismatched")
    message = shell.refuse("train", recipe(tmp_path, tmp_path / "mismatched", corpus))
    assert "vocab_size" in message


def test_another_recipe_does_not_overwrite_a_run(shell, tmp_path, model, corpus):
    short = {"steps": 1, "batch_size": 4, "warmup_steps": 0}
    shell.succeed("train", recipe(tmp_path, model, corpus, training=short))
    message = shell.refuse(
        "train", recipe(tmp_path, model, corpus, training=short, quantize={"activation_bits": 8})
    )
    assert "another recipe" in message


@pytest.mark.parametrize(
    "command", [[], ["train"], ["eval"], ["generate"], ["chat"], ["serve"], ["demo"], ["info"]]
)
def test_help_helps(shell, command):
    assert "Usage" in shell.succeed(*command, "--help")


def test_every_command_with_a_result_has_it_as_json():
    commands = get_command(app).commands
    without = {
        name
        for name, command in commands.items()
        if not any("--json" in option.opts for option in command.params)
    }
    assert without == {"demo", "chat", "serve", "lm-eval"}


def test_how_much_of_a_text_is_calibrated_on(shell, tmp_path, model, corpus):
    text, made = ("--weights", "nearest", "--data", corpus / "train"), []
    for windows in (2, 4):
        shell.succeed("quantize", model, tmp_path / "made", *text, "--windows", windows)
        made.append((tmp_path / "made/model.safetensors").read_bytes())
    assert made[0] != made[1]
    assert shell.run("quantize", model, tmp_path / "made", *text, "--windows", 0)[0] == 2


def test_json_is_all_there_is_on_standard_output(shell, tmp_path, model, corpus):
    def said(*command):
        return json.loads(shell.succeed(*command, "--json", "-"))

    text, made, file = ("--data", corpus / "train"), tmp_path / "made", tmp_path / "made.gguf"
    assert said("check", model)["trains"] == "yes"
    found = said("quantize", model, made, "--weights", "nearest", *text)
    assert found["model"] == str(made)
    assert 0 < found["kl"] < 1
    assert said("export", made, file) == {
        "file": str(file), "bytes": file.stat().st_size, "warnings": []
    }  # fmt: skip
    verified = file.read_bytes()
    (warning,) = said("export", made, file, "--no-verify")["warnings"]
    assert "were not compared" in warning
    assert file.read_bytes() == verified
    found = said("parity", made, file, *text, "--tokens", 64, "--sequence-length", 32)
    assert found["holds"]
    assert found["positions"] == 64
    found = said("train", recipe(tmp_path, model, corpus))
    assert load_model(found["model"]).is_quantized
    assert found["last"]["step"] == 4
    found = said("tokenize", corpus / "train", model, tmp_path / "tokens")
    assert found["bytes"] == 2 * found["tokens"]
    few = ("--data", corpus / "dev", "--tokens", 64, "--sequence-length", 32)
    assert len(said("compare", model, file, "--no-speed", *few)) == 2
    found = said("sensitivity", model, *few, "--output", tmp_path / "s")
    assert found == json.loads((tmp_path / "s/numbers.json").read_text())
    assert said("report", tmp_path / "s")["file"] == str(tmp_path / "s/report.html")
    assert shell.succeed("report", tmp_path / "s", "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["bytes"] > 0


def test_the_hash_of_a_run_is_that_of_its_last_logits_on_every_cpu(
    shell, tmp_path, model, corpus, monkeypatch
):
    file = tmp_path / "made.gguf"
    shell.succeed(
        "quantize", model, tmp_path / "made", "--weights", "nearest", "--data", corpus / "dev"
    )
    shell.succeed("export", tmp_path / "made", file)
    command = ("generate", file, "The girl", "--max-new-tokens", 5)
    found = json.loads(shell.succeed(*command, "--stats", "--json", "-"))
    engine = Engine(file)
    ids, stats = engine.tokenize("The girl"), found["stats"]
    assert stats["prompt_tokens"] == len(ids)
    for _ in range(stats["decoded_tokens"]):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    assert stats["logits_hash"] == hash_of(engine.logits(ids)[-1])
    for rate in ("prefill_tokens", "decode_tokens", "decode_gigabytes"):
        assert stats[f"{rate}_per_second"] > 0
    monkeypatch.setenv("SQUAT_ISA", "reference")
    _, text, error = shell.run(*command, "--stats")
    assert text.strip() == found["text"].strip()
    assert f"hash     {stats['logits_hash']} of the last logits" in error
    assert "reference" in error
    assert "is no .gguf file" in shell.refuse("generate", model, "The girl", "--stats")


def test_version_exit_status_and_completion(shell):
    assert shell.succeed("--version").strip() == f"squat {squat.__version__}"
    assert "3 time was up" in " ".join(shell.succeed("--help").replace("│", "").split())
    done = subprocess.run(
        [Path(sys.executable).with_name("squat")],
        env={**os.environ, "_SQUAT_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
    )
    assert "complete -o default -F _squat_completion squat" in done.stdout


def test_the_demo_ends_with_a_command_that_works(shell, tmp_path, model, corpus):
    quantized, file = tmp_path / "quantized", tmp_path / "a file.gguf"
    shell.succeed("quantize", model, quantized, "--data", corpus / "train", "--weights", "nearest")
    shell.succeed("export", quantized, file)
    command = [*shlex.split(next_command(file)), "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The boy near the tree")


@pytest.mark.slow
def test_the_installed_program_ends_without_a_traceback():
    program = "from squat.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "none.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("squat: none.yaml: cannot be read")
    assert "Traceback" not in done.stderr


def test_training_goes_on_from_what_quantize_made(shell, tmp_path, model, corpus):
    made = tmp_path / "made"
    shell.succeed("quantize", model, made, "--data", corpus / "train", "--activation-bits", 4)
    steps = {"steps": 1, "batch_size": 2, "save_every": 1, "warmup_steps": 0, "learning_rate": 1e-9}
    training = {**steps, "step_learning_rate": 1e-9}
    file = recipe(tmp_path, model, corpus, quantized=str(made), training=training)
    shell.succeed("train", file)
    shell.succeed("train", file)  # the same run, which is done
    start, trained = load_model(str(made)), load_model(str(tmp_path / "run/model"))
    assert trained.config.quantization_config.activation_bits == 4
    for name, module in start.named_modules():
        if isinstance(module, QuantizedWeight):
            assert torch.equal(trained.get_submodule(name).codes(), module.codes()), name


def test_a_start_that_does_not_fit_is_refused(shell, tmp_path, model, corpus):
    made, other = tmp_path / "made", tmp_path / "other"
    shell.succeed("quantize", model, made, "--weights", "nearest", "--data", corpus / "train")
    tokenizer = load_tokenizer(str(model))
    save_model(tiny_model(vocab_size=len(tokenizer), hidden_size=64), tokenizer, other)
    for changes, message in [
        ({"quantized": str(made), "quantize": {"activation_bits": 8}}, "quantize is given, too"),
        ({"quantized": str(made), "weights": "nearest"}, "weights is given, too"),
        ({"quantized": str(model)}, "is not quantized; make one by squat quantize"),
        ({"quantized": str(tmp_path / "no")}, "quantized"),
    ]:
        file = recipe(tmp_path, model, corpus, **changes)
        assert message in shell.refuse("train", file)
    (second := tmp_path / "second").mkdir()
    file = recipe(second, other, corpus, quantized=str(made))
    assert "has other weights than" in shell.refuse("train", file)
