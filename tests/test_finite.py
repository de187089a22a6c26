"""Training that leaves the finite numbers: stopped at once, where it began is said, what was saved stays."""

import json
import re

import pytest
import torch

from models import some_ids, tiny_model
from squat.checkpoints import load_model
from squat.data import PackedDataset
from squat.distill import LossConfig, SquatTrainer
from squat.errors import DivergedError
from squat.quantization import SquatConfig, quantize
from squat.reconstruction import Reconstruction, reconstruct
from test_cli import recipe
from test_distill import trainer

PRETRAINED = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_learning_rate_that_breaks_the_model_ends_with_status_1(
    shell, tmp_path, model, corpus, command
):
    training = {
        "steps": 6, "batch_size": 4, "save_every": 1, "warmup_steps": 1, "learning_rate": 1e30,
        "log_every": 1,
    }  # fmt: skip
    file = recipe(tmp_path, model, corpus, training=training)
    content = json.loads(file.read_text())
    if command == "train":  # with peaks nothing is large before the entropy's term is
        content |= {"quantize": {"token_steps": "exponent"}}
        file.write_text(json.dumps(content))
    else:
        content |= {"model": PRETRAINED, "tokenizer": {"vocab_size": 300}}
        file.write_text(json.dumps(content))
    status, out, error = shell.run(command, file)
    assert status == 1
    (message,) = [line for line in error.splitlines() if line.startswith("squat: ")]
    assert "training stopped at step " in message
    assert "earlier checkpoints are intact" in message
    term = "the loss term ce" if command == "train" else "the loss"
    found = (
        rf"({term} is nan|the gradient is not finite) \(.* model\.|model\.\S+ is no longer finite"
    )
    assert re.search(found, message)
    assert "'loss': 0.0" not in out + error
    run = tmp_path / "run"
    assert not (run / "model").exists()
    assert not (run / "log.json").exists()
    assert list(run.glob("checkpoints/checkpoint-1/model.safetensors"))
    for checkpoint in run.glob("checkpoints/checkpoint-*"):
        load_model(str(checkpoint))  # nothing in them is NaN or infinite
    assert shell.run(command, file)[0] == 1  # nor does the run count as done


def test_the_first_step_term_and_layer_are_named(tmp_path):
    run = trainer(tmp_path, steps=4)
    weight = run.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    step = 0

    def poison(*_):
        nonlocal step
        step += 1
        if step == 3:
            weight.data[0, 0] = torch.nan

    run.model.register_forward_pre_hook(poison)
    with pytest.raises(DivergedError) as caught:
        run.train()
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}: training stopped at step 3, earlier checkpoints are intact"
    )
    assert "the loss term ce is nan" in message
    assert "weights that are not finite are model.layers.1.mlp.up_proj.weight)" in message


def test_a_gradient_that_is_infinite_is_enough(tmp_path):
    run = trainer(tmp_path, steps=4)
    weight = run.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.register_hook(lambda gradient: gradient * torch.inf)
    before = weight.detach().clone()
    with pytest.raises(DivergedError, match=r"step 1, .*the gradient is not finite") as caught:
        run.train()
    assert "gradient that is not finite is that of model.layers.1.mlp.up_proj.weight" in str(
        caught.value
    )
    assert torch.equal(weight, before)


def test_weights_that_the_last_update_broke_are_not_saved(tmp_path):
    run = trainer(tmp_path, steps=3)
    weight = run.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    run.create_optimizer()
    run.optimizer.register_step_post_hook(lambda *_: weight.data.fill_(torch.inf))
    with pytest.raises(DivergedError, match=r"step 1|step 2"):
        run.train()
    run = trainer(tmp_path / "last", steps=1)
    weight = run.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    run.create_optimizer()
    run.optimizer.register_step_post_hook(lambda *_: weight.data.fill_(torch.inf))
    with pytest.raises(
        DivergedError, match=r"step 1, .*layers\.2\.mlp\.down_proj\.weight is no longer"
    ):
        run.train()
    assert not list((tmp_path / "last").glob("checkpoint-*"))


def test_a_large_gradient_is_no_infinite_one(tmp_path):
    """Its squares overflow, itself it does not."""
    tokens = some_ids(1, 400)[0].numpy().astype("uint16")
    model = quantize(tiny_model(), SquatConfig(activation_bits=8), calibration=[some_ids(8, 32)])
    model.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * 0 + 1e30)
    args = trainer(tmp_path, steps=2).args
    run = SquatTrainer(
        model,
        [],
        args,
        PackedDataset(tokens, 16, 8, seed=0),
        loss=LossConfig(gamma=0, distribution=0),
    )
    run.train()
    assert run.state.global_step == 2


def test_a_layer_that_breaks_while_it_is_reconstructed_is_named(tmp_path):
    # With levels layer 0 stays finite, and layer 2 breaks.
    config = SquatConfig(weight_levels="uniform", token_steps="exponent", reflections=False)
    model = quantize(tiny_model(), config, [some_ids(8, 32)])
    settings = Reconstruction(learning_rate=1e30)
    with pytest.raises(
        DivergedError, match=r"reconstruction: layer 0: the .* finite are mlp\.\S+\.weight\)"
    ):
        reconstruct(model, tiny_model(), some_ids(16, 32), settings, tmp_path)
    assert not list(tmp_path.iterdir())
