"""`squat check`: what is said of a model before any work."""

import pytest
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from models import some_ids
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.engine import Engine
from squat.errors import EngineError
from squat.quantization import SquatConfig, quantize


def said(shell, folder):
    return " ".join(shell.succeed("check", folder).replace("│", " ").split())


def test_a_model_that_goes_the_whole_way(shell, model):
    text = said(shell, model)
    assert "architecture llama, context 64" in text
    assert "trains yes" in text
    assert "exports, and runs in the engine yes" in text
    assert "8-bit embedding and head about 0 MB" in text
    assert "tokens a second" in text


@pytest.mark.parametrize(
    ("steps", "softmax", "most"),
    [("peak", "natural", 65536), ("exponent", "base2", 65536), ("exponent", "natural", 131072)],
)
def test_a_context_that_is_longer_than_the_engines(shell, model, tmp_path, steps, softmax, most):
    longer = load_model(str(model))
    longer.config.max_position_embeddings = 200_000
    tokenizer = load_tokenizer(str(model))
    save_model(longer, tokenizer, tmp_path / "longer")
    says = f"max_position_embeddings is 200000, but the engine holds {most} tokens"
    if steps == "peak":  # the usual
        assert f"beware {says}" in said(shell, tmp_path / "longer")
    config = SquatConfig(token_steps=steps, softmax=softmax)
    quantize(longer, config, calibration=[some_ids(4, 16)])
    save_model(longer, tokenizer, tmp_path / "quantized")
    status, _, warnings = shell.run("export", tmp_path / "quantized", tmp_path / "m.gguf")
    assert status == 0
    assert f"squat: warning: {says}" in warnings
    assert GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 200_000
    engine = Engine(tmp_path / "m.gguf", threads=1)
    assert engine.info.context == most
    with pytest.raises(
        EngineError, match=rf"{most + 1} after the 0 .* {most}, the most that a session"
    ):
        engine.prefill([5] * (most + 1))
    with pytest.raises(
        EngineError, match=rf"context: {most + 1} is more than the {most} .* can hold"
    ):
        Engine(tmp_path / "m.gguf", context=most + 1)
    with pytest.raises(
        EngineError, match=rf"of 9; shorten .* or load with a context of up to {most}"
    ):
        Engine(tmp_path / "m.gguf", context=9).prefill([5] * 10)


def test_an_architecture_that_is_not_known(shell, model, tmp_path):
    tokenizer = load_tokenizer(str(model))
    config = AutoConfig.for_model(
        "bloom", vocab_size=len(tokenizer), hidden_size=8, n_head=2, n_layer=1
    )
    config.max_position_embeddings = 32
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "bloom")
    text = said(shell, tmp_path / "bloom")
    assert "trains no: model_type: architecture 'bloom' has no row" in text
    assert "exports, and runs in the engine no:" in text
    assert "tokens a second" not in text


def test_a_model_that_trains_only(shell, model, tmp_path):
    changed = load_model(str(model))
    changed.config.hidden_act = "relu"
    save_model(changed, load_tokenizer(str(model)), tmp_path / "relu")
    text = said(shell, tmp_path / "relu")
    assert "trains yes" in text
    assert "engine no: " in text
    assert "hidden_act is 'relu'" in text
