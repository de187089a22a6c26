"""compare, sensitivity and attention: what they find against definitions, and what they refuse."""

import csv
import json

import numpy as np
import pytest
import torch

from models import some_ids, tiny_model
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.deploy.export import export
from squat.evaluate.observation import entropy_bits, observe
from squat.evaluate.sensitivity import groups_of, only, sensitivity
from squat.evaluate.tasks import label_of
from squat.quantization import SquatConfig, quantize
from squat.report.sections import read_section


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """The folder of a quantized model and its file."""
    folder = tmp_path_factory.mktemp("studies") / "adaptive"
    tokenizer = load_tokenizer(str(model))
    save_model(quantize(load_model(str(model)), SquatConfig()), tokenizer, folder)
    file = folder.with_suffix(".gguf")
    export(load_model(str(folder)), tokenizer, "adaptive", file)
    return folder, file


# --- Sensitivity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2"])
def test_groups_cover_the_model(name):
    model = quantize(tiny_model(name), SquatConfig(activation_bits=4))
    groups = {group.name: group.members for group in groups_of(model)}
    whole = groups["everything"]
    assert groups["attention"] | groups["MLP"] | groups["embeddings and head"] == whole
    assert not groups["attention"] & groups["MLP"]
    assert groups["q and k"] == groups["q"] | groups["k"]
    assert groups["q and k"] < groups["attention"]
    layers = [groups[f"layer {index}"] for index in range(3)]
    assert frozenset().union(*layers) | groups["embeddings and head"] == whole
    assert groups["all weights"] | groups["all activations"] == whole


def test_only_what_is_named_is_quantized():
    ids = some_ids()
    full = tiny_model()
    model = quantize(tiny_model(), SquatConfig(activation_bits=4))
    with torch.no_grad():
        before = model(ids).logits
        with only(model, ()):
            assert torch.allclose(model(ids).logits, full(ids).logits, atol=1e-4)
        groups = {group.name: group.members for group in groups_of(model)}
        with only(model, groups["everything"]):
            assert torch.equal(model(ids).logits, before)
        with only(model, groups["probs"]):
            assert not torch.allclose(model(ids).logits, full(ids).logits, atol=1e-4)
        with only(model, groups["mlp_mid"]):
            alone = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        expected = quantize(
            tiny_model(),
            SquatConfig(
                weight_bits=32,
                embedding_bits=32,
                activation_bits=32,
                site_bits={"mlp_mid": 4, "probs": 32, "head_in": 32},
            ),
        )
        for layer, theirs in zip(expected.model.layers, model.model.layers, strict=True):
            site = theirs.mlp.down_proj.input_quantizer
            layer.mlp.down_proj.input_quantizer.load_state_dict(site.state_dict())
        assert torch.allclose(alone, expected(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_effects_are_what_they_say(name):
    windows = some_ids(6, 20)
    model = quantize(tiny_model(name), SquatConfig(activation_bits=3))
    full, effects = sensitivity(model, windows, batch_size=4)
    with torch.no_grad():
        reference = tiny_model(name)(windows, labels=windows)
        quantized = model(windows, labels=windows)
    everything = effects[0]
    assert full == pytest.approx(reference.loss.item(), abs=1e-5)
    assert everything.loss == pytest.approx(quantized.loss.item(), abs=1e-5)
    assert everything.added == pytest.approx(everything.loss - full)
    squares = (reference.logits - quantized.logits).square().mean().item()
    assert everything.mse == pytest.approx(squares, rel=1e-4)
    p, q = reference.logits.log_softmax(-1), quantized.logits.log_softmax(-1)
    assert everything.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert all(effect.kl > 0 for effect in effects)
    assert everything.kl > max(e.kl for e in effects if e.kind == "site")
    mixers = {"llama": "self_attn", "lfm2": "conv"}
    parts = {group.name: group.members for group in groups_of(model)}
    assert any(f".{mixers[name]}." in member for member in parts["attention"])
    assert not any(f".{mixers[name]}." in member for member in parts["MLP"])


# --- Observation ---------------------------------------------------------------------------------


def test_a_float_model_is_observed_as_it_is():
    windows = some_ids(3, 12)
    with torch.no_grad():
        eager = tiny_model()
        eager.set_attn_implementation("eager")
        maps = eager(windows, output_attentions=True).attentions
    seen = observe(tiny_model(), windows, [1, 5, 6])
    assert seen.widths is None
    for layer, expected in enumerate(maps):
        assert np.allclose(seen.maps[layer], expected[0].mean(0), atol=1e-5)
        assert np.allclose(seen.first_column[layer], expected[..., 0].mean((0, 1)), atol=1e-5)
    assert seen.similarity(seen) == pytest.approx(1)


def test_a_quantized_model_shows_its_codes_and_widths():
    # Of one step for all tokens: an exponent gives a token 16 other values.
    config = SquatConfig(activation_bits=4, token_steps="static", wide_first_token=False)
    model = quantize(tiny_model(), config)
    assert all(len(np.unique(q)) <= 16 for q in observe(model, some_ids(), [1, 5, 6]).query)
    model = quantize(tiny_model(), SquatConfig(ratio=0.5))
    text = [1, *some_ids(1, 20)[0].tolist()]
    seen = observe(model, some_ids(), text)
    assert seen.widths.shape == (3, 21)
    assert 0 < seen.widths.mean() < 1


def test_entropy_is_in_bits():
    assert entropy_bits(np.array([4, 4, 4, 4, 0])) == pytest.approx(2)
    assert entropy_bits(np.array([0, 7])) == 0


# --- On the command line -------------------------------------------------------------------------


def test_compare(shell, tmp_path, model, quantized, corpus):
    folder, file = quantized
    written = {
        "--json": tmp_path / "c.json",
        "--csv": tmp_path / "c.csv",
        "--output": tmp_path / "c",
    }
    options = [part for pair in written.items() for part in pair]
    shell.succeed(
        "compare", model, folder, file, "--data", corpus / "dev", "--tokens", 400,
        "--sequence-length", 32, "--pairs", corpus / "pairs", "--limit", 3, *options,
    )  # fmt: skip
    first, second, third = json.loads((tmp_path / "c.json").read_text())
    assert first["kl"] == 0
    assert second["kl"] > 0
    for measure in ("loss", "kl", "all"):  # folder and file compute the same
        assert third[measure] == pytest.approx(second[measure], abs=1e-6)
    assert second["megabytes"] < first["megabytes"] / 2
    assert third["megabytes"] == pytest.approx(file.stat().st_size / 1e6)
    assert all(entry["decode"] > 0 for entry in (first, second, third))
    assert (first["bits"], second["bits"]) == ("float", "W4A4:8")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert float(rows[1]["loss"]) == second["loss"]
    assert read_section(tmp_path / "c").command.startswith("squat compare")


def test_compare_refuses(shell, tmp_path, model):
    assert "two or more" in shell.refuse("compare", model)
    assert "no model could be loaded" in shell.refuse("compare", model, tmp_path / "none")
    assert "no such file" in shell.refuse("compare", model, model, "--data", tmp_path / "none")
    assert "jsonl" in shell.refuse("compare", model, model, "--pairs", tmp_path)


def test_sensitivity(shell, tmp_path, model, corpus):
    out = tmp_path / "s"
    data = ("--data", corpus / "dev", "--sequence-length", 16)
    shell.succeed("sensitivity", model, *data, "--output", out, "--tokens", 64)
    section = read_section(out)
    assert len(section.tables[0].rows) == 1 + 7 + 9 + 3
    assert all(
        (out / name).read_bytes().startswith(b"\x89PNG") for name in section.figures.values()
    )
    message = shell.refuse("attention", model, *data, "--output", out, "--text", "caf\udce9")
    assert "text: character 4 is the byte 0xe9" in message
    message = shell.refuse("sensitivity", model, *data, "--output", out, "--weight-bits", 9)
    assert "weight_bits: 9" in message
    assert "cannot be looked into" in shell.refuse("sensitivity", "a.gguf", *data, "--output", out)
    short = ("--data", corpus / "dev", "--sequence-length", 10**6, "--output", out)
    assert "do not fill one window" in shell.refuse("sensitivity", model, *short)


def test_attention(shell, tmp_path, model, quantized, corpus):
    out = tmp_path / "a"
    data = ("--data", corpus / "dev", "--sequence-length", 16, "--windows", 2, "--output", out)
    shell.succeed(
        "attention", model, quantized[0], *data, "--text", "The girls that run see a boy."
    )
    section = read_section(out)
    assert {"distributions.png", "maps.png", "first-column.png", "widths-adaptive.png"} == set(
        section.figures.values()
    )
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers["tiny"]["similarity"] == pytest.approx(1)
    assert numbers["adaptive"]["wide_share"] is not None
    assert "--layer: 7" in shell.refuse("attention", model, *data, "--layer", 7)
    assert "--text: is empty" in shell.refuse("attention", model, *data, "--text", "")


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("models/babylm-6m", "babylm-6m"),
        ("a/w4a4.gguf", "w4a4"),
        ("runs/w4a4/model", "w4a4"),
        ("runs/w4a4/model.gguf", "w4a4"),
        ("runs/lsq/seed-1/model", "lsq-seed-1"),
    ],
)
def test_models_are_called_by_what_tells_them_apart(path, label):
    assert label_of(path) == label
