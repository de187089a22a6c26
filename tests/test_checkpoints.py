"""Model folders of strangers, damaged ones, and what a crash leaves: one line each, nothing lost."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import TINY, quantized_model, tiny_model
from squat import checkpoints
from squat.checkpoints import load_model, load_tokenizer, recover, save_model
from squat.errors import CheckpointError
from squat.quantization import SquatConfig
from squat.quantization.quantizers import QUANTIZERS


@pytest.fixture
def folder(model, tmp_path):
    """A copy to damage."""
    return shutil.copytree(model, tmp_path / "folder")


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def quantized_by(method, **more):
    return lambda folder: change_config(
        folder, quantization_config={"quant_method": method, "bits": 4, **more}
    )


def set_value(value):
    def change(folder):
        change_weights(
            folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(value)
        )

    return change


def rename(folder):
    def change(tensors):
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(48, 32)

    change_weights(folder, change)


def cut_bin(folder):
    as_bin(folder)
    cut(folder / "pytorch_model.bin", -1000)


def lose_a_shard(folder):
    load_model(str(folder)).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*"))[1].unlink()


DAMAGED = {
    "gptq": (
        quantized_by("gptq", group_size=128),
        "config.json: the weights are quantized by gptq; name",
    ),
    "awq": (
        quantized_by("awq"),
        "config.json: the weights are quantized by awq; name the full-precision",
    ),
    "bitsandbytes": (
        quantized_by("bitsandbytes", load_in_4bit=True),
        "config.json: the weights are quantized by bitsandbytes; name the full-precision",
    ),
    "a method nobody knows": (quantized_by("squash"), "the weights are quantized by squash; name"),
    "AutoGPTQ": (
        lambda f: (f / "quantize_config.json").write_text("{}"),
        "quantize_config.json: the weights are quantized by another program; name the full-precision",
    ),
    "another hidden size": (
        lambda f: change_config(f, hidden_size=64),
        r"weight model.embed_tokens.weight is \[\d+, 32\], but \[\d+, 64\] by config.json",
    ),
    "fewer layers": (
        lambda f: change_config(f, num_hidden_layers=2),
        r"the weights hold model.layers.2.\S+, which the model of config.json has not \(9 such",
    ),
    "more layers": (
        lambda f: change_config(f, num_hidden_layers=4),
        r"the weights lack model.layers.3.\S+ \(9 missing in all\)",
    ),
    "a layer nobody has": (rename, "the weights hold model.layers.7.mlp.up_proj.weight"),
    "NaN": (
        set_value(torch.nan),
        "weight model.layers.1.mlp.up_proj.weight has values that are NaN",
    ),
    "infinite": (set_value(-torch.inf), "weight model.layers.1.mlp.up_proj.weight has values that"),
    "a cut .safetensors": (
        lambda f: cut(f / "model.safetensors", -1000),
        "model.safetensors: not a complete safetensors file",
    ),
    "an empty .safetensors": (
        lambda f: cut(f / "model.safetensors", 0),
        "model.safetensors: not a complete safetensors file",
    ),
    "a cut .bin": (cut_bin, "pytorch_model.bin: not a complete file of PyTorch"),
    "a shard that is missing": (lose_a_shard, r"no model could be loaded .*model-00002-of"),
    "a cut config.json": (lambda f: cut(f / "config.json", 50), "config.json"),
    "a cut tokenizer.json": (
        lambda f: cut(f / "tokenizer.json", 500),
        "no tokenizer could be loaded",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model could be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(shell, folder, corpus, damage):
    change, message = DAMAGED[damage]
    change(folder)
    status, out, error = shell.run("generate", folder, "The")
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert error.startswith(f"squat: {folder}")
    assert re.search(message, error), error


def test_whole_folders_of_either_kind_load(folder):
    expected = load_model(str(folder)).state_dict()
    as_bin(folder)
    found = load_model(str(folder)).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_weights_that_programs_are_used_to_leave_out_are_no_fault(model, tmp_path):
    """A tied head that is there once more, GPT-2's masks and names without their prefix, old frequencies."""
    tokenizer = load_tokenizer(str(model))
    for name in ("llama", "gpt2"):
        folder, network = tmp_path / name, tiny_model(name, vocab_size=len(tokenizer))
        save_model(network, tokenizer, folder)

        def change(tensors, name=name):
            if name == "llama":
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
                tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
            else:
                for key in list(tensors):
                    tensors[key.removeprefix("transformer.")] = tensors.pop(key)
                tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

        change_weights(folder, change)
        assert same_weights(load_model(str(folder)), network)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_every_quantized_model_that_was_saved_loads(tmp_path, model, name, method):
    tokenizer = load_tokenizer(str(model))
    made = quantized_model(name, SquatConfig(method=method), vocab_size=len(tokenizer))
    save_model(made, tokenizer, tmp_path / "quantized")
    assert load_model(str(tmp_path / "quantized")).config.quantization_config.method == method


# --- writing ---


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", [0, 1, "rmtree"])
def test_a_crash_while_a_folder_is_replaced_loses_nothing(folder, monkeypatch, moment):
    first, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    second = tiny_model(seed=1, vocab_size=len(tokenizer))
    moves = []

    def replace(source, target):
        if len(moves) == moment:
            raise Crash
        moves.append(target)
        os.rename(source, target)

    def remove(path, **_):
        if moment == "rmtree" and moves:
            raise Crash
        shutil.rmtree(path, **_)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "os", Namespace(os, replace=replace))
        patch.setattr(checkpoints, "shutil", Namespace(shutil, rmtree=remove))
        with pytest.raises(Crash):
            save_model(second, tokenizer, folder)
    expected = second if moment == "rmtree" else first
    assert same_weights(load_model(str(folder)), expected)  # found although it had been moved away
    save_model(second, tokenizer, folder)
    assert same_weights(load_model(str(folder)), second)
    assert [entry.name for entry in folder.parent.iterdir()] == ["folder"]


class Namespace:
    """A module with some of its functions replaced."""

    def __init__(self, module, **changes):
        self.module = module
        self.__dict__.update(changes)

    def __getattr__(self, name):
        return getattr(self.module, name)


def same_weights(a, b):
    others = b.state_dict()
    return all(torch.equal(value, others[name]) for name, value in a.state_dict().items())


def test_what_lies_beside_a_folder_is_in_nobodys_way_and_stays(folder):
    for name in ("folder.old", "folder.partial"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "mine").write_text("kept")
    save_model(load_model(str(folder)), load_tokenizer(str(folder)), folder)
    recover(folder)
    assert (folder.parent / "folder.old/mine").read_text() == "kept"
    assert (folder.parent / "folder.partial/mine").read_text() == "kept"


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    first, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))

    def full(source, target):
        if "partial" in str(source):
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    monkeypatch.setattr(checkpoints, "os", Namespace(os, replace=full))
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left.* is intact"):
        save_model(tiny_model(seed=1, vocab_size=len(tokenizer)), tokenizer, folder)
    assert same_weights(load_model(str(folder)), first)


def test_a_folder_that_must_not_be_replaced_is_refused_before_the_work(
    shell, model, corpus, tmp_path, monkeypatch
):
    inner = tmp_path / "outer/inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for output in (".", "..", inner, tmp_path, "/"):
        message = shell.refuse("quantize", model, output, "--data", corpus / "train")
        assert f"squat: {output}: is the current folder or one around it" in message
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("Dear")
    message = shell.refuse("quantize", model, tmp_path / "letters")
    assert "is there already, and no model's folder" in message
    assert "is there already, and a file" in shell.refuse(
        "quantize", model, tmp_path / "letters/dear.txt"
    )
    assert (tmp_path / "letters/dear.txt").read_text() == "Dear"
    assert "is a folder; name a file" in shell.refuse("tokenize", corpus / "train", model, ".")
    (tmp_path / "empty").mkdir()
    shell.succeed("quantize", model, tmp_path / "empty", "--data", corpus / "train",
                  "--weights", "nearest")  # fmt: skip
    load_model(str(tmp_path / "empty"))
    assert ".: is a folder; name a file" in shell.refuse("export", tmp_path / "empty", ".")
