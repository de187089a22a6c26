"""A quantized model is one of transformers': loading, pipelines, trainers, adapters, a folder for the Hub."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, pipeline

from models import some_ids, tiny_model
from squat import SquatConfig, SquatTrainer, quantize
from squat.checkpoints import load_tokenizer
from squat.data import PackedDataset
from squat.deploy.export import export
from squat.engine import Engine
from squat.errors import ConfigError
from squat.recipes import TrainRecipe, read_recipe


def trainer(model, folder, teacher=None):
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", learning_rate=1e-2, max_steps=4,
        disable_tqdm=True,
    )  # fmt: skip
    tokens = some_ids(1, 600)[0].numpy().astype(np.uint16)
    dataset = PackedDataset(tokens, 16, 64, 0)
    return SquatTrainer(model, [teacher or tiny_model()], args, dataset)


def test_from_pretrained_pipeline_and_trainer(model, tmp_path):
    config = SquatConfig(weight_bits=4, activation_bits=8)
    quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer(quantized, tmp_path / "run", AutoModelForCausalLM.from_pretrained(model)).train()
    quantized.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    options = {"max_new_tokens": 8, "do_sample": False}
    talks = pipeline("text-generation", str(tmp_path / "quantized"), device="cpu")
    (said,) = talks("The girl", **options)
    export(quantized.eval(), load_tokenizer(str(model)), "tiny", tmp_path / "tiny.gguf")
    engine = Engine(tmp_path / "tiny.gguf")
    assert said["generated_text"] == "The girl" + engine.generate("The girl", 8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_lora_trains_in_front_of_the_quantizer_is_what_it_merges(name, tmp_path):
    quantized = quantize(tiny_model(name), SquatConfig(activation_bits="4:8"))
    before = {n: p.clone() for n, p in quantized.named_parameters() if n.endswith(".weight")}
    weights = ["q_proj.weight", "down_proj.weight"] if name == "llama" else ["c_attn.weight"]
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[], target_parameters=weights)
    model = get_peft_model(quantized, adapters)
    trainer(model, tmp_path, tiny_model(name, seed=1)).train()
    ids = some_ids(2, 20)
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert torch.equal(merged(input_ids=ids).logits, trained)
    changed = {n for n, p in merged.named_parameters() if n in before and (p != before[n]).any()}
    assert {re.sub(r".*?(\w+\.weight)$", r"\1", n) for n in changed} == set(weights)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained)


def test_lora_beside_the_quantizer_is_refused_with_the_way_out(tmp_path):
    model = get_peft_model(
        quantize(tiny_model()), LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"])
    )
    with pytest.raises(ConfigError, match=r'v_proj: .*target_parameters=\["v_proj.weight"'):
        trainer(model, tmp_path)


def test_a_folders_card_says_what_was_done_until_somebody_writes_one(
    shell, tmp_path, model, corpus
):
    folder = tmp_path / "smol"
    calibration = ("--data", corpus / "train", "--weights", "nearest")
    said = shell.succeed("quantize", model, folder, *calibration)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "4-bit" in card.data.tags
    assert "base_model" not in card.data.to_dict()  # a folder here is nothing to others
    assert f"squat quantize {model} {folder}" in card.text
    assert "| weights | 4 bits, a step for each row, levels iq4_nl |" in card.text
    kl = re.search(r"KL to the original (\S+)", said)[1]
    assert re.search(rf"\| KL to the original \| {kl} nats", card.text)
    shell.succeed("export", folder, tmp_path / "elsewhere.gguf")
    assert ".gguf`" not in (folder / "README.md").read_text()
    shell.succeed("export", folder, folder / "smol.gguf")
    text = (folder / "README.md").read_text()
    assert re.search(r"`smol.gguf`, \d+\.\d MB", text)
    assert text.count("## In one file") == 1
    python = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=True)

    (folder / "README.md").write_text("Mine.")
    shell.succeed("quantize", model, folder, "--weight-bits", 8, *calibration)
    shell.succeed("export", folder, folder / "smol.gguf")
    assert (folder / "README.md").read_text() == "Mine."


def test_a_trained_models_card_has_its_recipe_and_losses(shell, tmp_path, model, corpus):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path}/run\nmodel: {model}\n"
        f"data: {{train: {corpus}/train, sequence_length: 16, cache: {tmp_path}/c}}\n"
        "weights: nearest\ntraining: {steps: 3, batch_size: 4, log_every: 1}\n"
    )
    shell.succeed("train", recipe)
    text = (tmp_path / "run/model/README.md").read_text()
    assert "| training | all weights, 3 steps |" in text
    assert re.search(r"\| training: kl \| \d+\.\d{4}, on training text, about step 3 \|", text)
    (tmp_path / "again.yaml").write_text(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert read_recipe(tmp_path / "again.yaml", TrainRecipe) == read_recipe(recipe, TrainRecipe)
