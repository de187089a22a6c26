"""A stranger's checkpoint and its .gguf file read, score and end a text alike, whatever its configs say."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models import tiny_model
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.data import tokenize_corpus
from squat.data.tokenizer import id_limit
from squat.deploy.export import export
from squat.engine import Engine
from squat.evaluate.huggingface import HuggingFaceScorer
from squat.evaluate.tasks import engine_tokenizer
from squat.generation import continue_text
from squat.quantization import SquatConfig, quantize
from tokenizer_kinds import KINDS

TEXTS = ["The dog sees the cat.", " It's 1999, été", "<s>a", "日本 😀\n\n"]


def folder_of(path, tokenizer, special, name="llama", quantized=True, spare=5, **config):
    """A model's folder with a tokenizer; `spare` rows of the embedding have no token."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    rows = id_limit(wrapped) + spare
    model = tiny_model(name, vocab_size=rows, max_position_embeddings=128, **config)
    if quantized:
        quantize(model, SquatConfig(activation_bits=8))
    save_model(model, wrapped, path)
    return path


def change_json(file, **fields):
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**data, **fields}))


def both(folder):
    """The model and the tokenizer of a folder, and an engine with its file."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    export(model, tokenizer, "tiny", folder / "model.gguf")
    return model, tokenizer, Engine(folder / "model.gguf", threads=1)


def fields(folder):
    return {k: f.contents() for k, f in GGUFReader(folder / "model.gguf").fields.items()}


LLAMA_2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN2 = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
GPT_2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


@pytest.mark.parametrize(
    ("kind", "special", "config"),
    [
        ("llama-2", LLAMA_2, {}),
        ("llama-2", LLAMA_2, {"bos_token_id": 0, "eos_token_id": 7}),
        ("llama-2", LLAMA_2, {"bos_token_id": None, "eos_token_id": None}),
        ("gemma", LLAMA_2, {"bos_token_id": 2}),
        ("llama-3", {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, {}),
        ("qwen2", QWEN2, {"bos_token_id": 5}),
        ("gpt-2", GPT_2, {"bos_token_id": None}),
        ("holes", GPT_2, {"eos_token_id": [0, 3]}),
    ],
)
def test_they_agree_on_every_text(tmp_path, corpus, kind, special, config):
    model, tokenizer, engine = both(folder_of(tmp_path / "m", KINDS[kind](), special, **config))
    for text in TEXTS:
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]
    scores = HuggingFaceScorer(model, tokenizer).score(TEXTS)
    assert engine.score(TEXTS) == pytest.approx(scores, abs=1e-3)
    ids = tokenize_corpus(corpus / "dev", tokenizer, tmp_path / "cache")
    assert (
        ids.tolist()
        == tokenize_corpus(corpus / "dev", engine_tokenizer(engine), tmp_path / "other").tolist()
    )
    assert engine.info.bos_token == tokenizer.bos_token_id
    assert engine.info.eos_token == tokenizer.eos_token_id


def test_what_stands_in_front_is_what_the_tokenizer_puts_there(tmp_path):
    for kind, special, front in (
        ("llama-2", LLAMA_2, [1]),
        ("gpt-2", GPT_2, []),
        ("qwen2", QWEN2, []),
    ):
        folder = folder_of(tmp_path / kind, KINDS[kind](), special)
        _, _, engine = both(folder)
        assert engine.tokenize("") == front
        assert fields(folder)["tokenizer.ggml.add_bos_token"] == bool(front)


def greedy(model, tokenizer, count):
    """What a folder's model goes on with after a prompt, nothing ending it."""
    ids = tokenizer("The dog")["input_ids"]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_any_of_several_ends_ends_an_answer(tmp_path, place):
    folder = folder_of(tmp_path / "m", KINDS["gpt-2"](), GPT_2, eos_token_id=0)
    with torch.no_grad():
        answer = greedy(load_model(str(folder)), load_tokenizer(str(folder)), 8)
    end = next(token for token in answer[1:] if token != answer[0])
    shown = answer[: answer.index(end)]
    (folder / "generation_config.json").unlink(missing_ok=True)
    change_json(folder / place, eos_token_id=[0, end])
    _, tokenizer, engine = both(folder)
    expected = "The dog" + tokenizer.decode(shown)
    assert engine.info.eos_tokens == (0, end)
    assert "".join(continue_text(str(folder / "model.gguf"), "The dog", 8, 0.0, 1.0, 0)) == expected
    # transformers shows an end that is no special token.
    text = "".join(continue_text(str(folder), "The dog", 8, 0.0, 1.0, 0))
    assert text.removesuffix(tokenizer.decode([end])) == expected
    assert fields(folder)["tokenizer.ggml.eos_token_id"] == 0
    assert fields(folder)["squat.tokenizer.eos_token_ids"] == [0, end]


def test_an_empty_prompt_begins_with_bos_or_is_refused(tmp_path, shell):
    with_bos = folder_of(tmp_path / "a", KINDS["gpt-2"](), GPT_2)
    without = folder_of(tmp_path / "b", KINDS["qwen2"](), QWEN2)
    for folder in (with_bos, without):
        both(folder)
    for model in (with_bos, with_bos / "model.gguf"):
        shell.succeed("generate", model, "", "--max-new-tokens", 2)
    for model in (without, without / "model.gguf"):
        message = shell.refuse("generate", model, "", "--max-new-tokens", 2)
        assert (
            "prompt: is empty, and the model has no bos token to begin with; give a word" in message
        )


def test_an_end_outside_of_the_vocabulary_is_named(tmp_path, shell):
    folder = folder_of(tmp_path / "m", KINDS["gpt-2"](), GPT_2)
    change_json(folder / "generation_config.json", eos_token_id=[0, 9999])
    message = shell.refuse("export", folder, tmp_path / "m.gguf")
    assert "eos_token_id: 9999 is outside the model's vocabulary" in message
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.slow
def test_the_way_of_a_config_that_contradicts_its_tokenizer(tmp_path, shell, corpus):
    folder = folder_of(
        tmp_path / "m", KINDS["llama-2"](), LLAMA_2, quantized=False, bos_token_id=7, eos_token_id=9
    )
    output, file = tmp_path / "q", tmp_path / "q.gguf"
    status, _, said = shell.run(
        "quantize", folder, output, "--data", corpus / "train", "--weights", "nearest"
    )
    assert status == 0
    assert "bos_token_id is 7 in config.json, but 1 in the tokenizer, which is taken" in said
    assert "eos_token_id is 9 in config.json, but 2 in the tokenizer, which is taken" in said
    status, _, said = shell.run("export", output, file)
    assert status == 0
    assert said.count("which is taken") == 2
    shell.succeed("parity", output, file, "--data", corpus / "dev", "--tokens", 200)
    results = [
        json.loads(
            shell.succeed(
                "eval", name, "--task", "blimp", "--data", corpus / "pairs", "--json", "-"
            )
        )
        for name in (output, file)
    ]
    assert results[0]["average_paradigms"] == results[1]["average_paradigms"]


@pytest.mark.parametrize("kind", ["qwen2", "holes"])
def test_strangers_go_the_whole_way(tmp_path, shell, corpus, kind):
    """Qwen2 with its own tokenizer, and ids with a hole."""
    special = QWEN2 if kind == "qwen2" else GPT_2
    folder = folder_of(tmp_path / "m", KINDS[kind](), special, name="qwen2", quantized=False)
    output, file = tmp_path / "q", tmp_path / "q.gguf"
    status, _, said = shell.run(
        "quantize", folder, output, "--data", corpus / "train", "--weights", "nearest"
    )
    assert (status, "cannot be exported" in said) == (0, False)
    shell.succeed("export", output, file)
    shell.succeed("parity", output, file, "--data", corpus / "dev", "--tokens", 200)
    losses = [
        json.loads(
            shell.succeed(
                "eval", name, "--task", "perplexity", "--data", corpus / "dev", "--json", "-"
            )
        )["loss"]
        for name in (output, file)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_parity_sees_a_file_with_another_tokenizer(tmp_path, shell, corpus):
    folder = folder_of(tmp_path / "m", KINDS["gpt-2"](), GPT_2)
    other = folder_of(tmp_path / "n", KINDS["olmo-2"](), GPT_2)
    model = load_model(str(folder))
    rows = load_model(str(other)).config.vocab_size
    assert rows == model.config.vocab_size
    export(model, load_tokenizer(str(other)), "tiny", tmp_path / "m.gguf")
    status, out, _ = shell.run("parity", folder, tmp_path / "m.gguf", "--data", corpus / "dev")
    assert status == 1
    assert "NO" in out


@pytest.fixture
def word_level(tmp_path):
    words = [
        "<unk>",
        "<s>",
        "</s>",
        ".",
        *["the", "a", "boy", "girl", "dog", "cat", "sees", "likes", "that", "and", "is"],
    ]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return folder_of(tmp_path / "m", tokenizer, LLAMA_2, quantized=False)


def short_run(folder, model, corpus):
    """The recipe of one step of training."""
    content = {
        "output": str(folder / "run"),
        "model": str(model),
        "weights": "nearest",
        "data": {
            "train": str(corpus / "train"),
            "sequence_length": 16,
            "cache": str(folder / "c"),
        },
        "training": {
            "steps": 1,
            "batch_size": 2,
            "save_every": 1,
            "log_every": 1,
            "warmup_steps": 0,
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


def test_what_cannot_be_exported_is_said_before_the_work(tmp_path, shell, corpus, word_level):
    refused = "a WordLevel model cannot be expressed"
    status, _, said = shell.run(
        "quantize", word_level, tmp_path / "q", "--data", corpus / "train", "--weights", "nearest"
    )
    assert status == 0
    assert f"warning: the result cannot be exported: tokenizer.json: {refused}" in said
    assert refused in shell.refuse("export", tmp_path / "q", tmp_path / "q.gguf")
    status, _, said = shell.run("train", short_run(tmp_path, word_level, corpus))
    assert status == 0, said
    assert refused in said


@pytest.mark.slow
def test_several_processes_say_it_once(tmp_path, corpus, word_level):
    recipe = short_run(tmp_path, word_level, corpus)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "squat", "train", recipe],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("squat: warning: the result cannot be exported") == 1
