"""`squat check`: what is said of a model before any work."""

from transformers import AutoConfig, AutoModelForCausalLM

from squat.checkpoints import load_model, load_tokenizer, save_model


def said(shell, folder):
    return " ".join(shell.succeed("check", folder).replace("│", " ").split())


def test_a_model_that_goes_the_whole_way(shell, model):
    text = said(shell, model)
    assert "architecture llama, context 64" in text
    assert "trains yes" in text
    assert "exports, and runs in the engine yes" in text
    assert "8-bit embedding and head about 0 MB" in text
    assert "tokens a second" in text


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
