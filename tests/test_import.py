"""Models from other programs' .gguf files: weights, config and tokenizer are the file's, or it is refused."""

from __future__ import annotations

import contextlib
import json
import random
import re

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_models import TEXT, random_model, sentencepiece_tokenizer
from foreign_files import (
    Type,
    keys_of,
    packed,
    same_weights,
    tensors_of,
    write,
    write_model,
)
from models import some_ids, tiny_model
from real_models import smollm2
from squat.checkpoints import load_model, load_tokenizer
from squat.deploy.gguf import write_gguf
from squat.deploy.splits import SPLITS
from squat.errors import CheckpointError
from squat.model_names import runs_in_engine

VOCABULARY = 300


def model_of(name="llama", **overrides):
    return tiny_model(name, vocab_size=VOCABULARY, **overrides)


@torch.no_grad()
def logits(model):
    return model(some_ids(vocab=VOCABULARY), use_cache=False).logits


# --- weights and config


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {}),
        ("llama-untied", {}),
        ("llama", {"head_dim": 12, "mlp_bias": True}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": YARN}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        (
            "smollm3",
            {"num_hidden_layers": 4, "no_rope_layers": None},
        ),  # llama.cpp: three in four rotate
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False}),
        # llama.cpp knows which layers are local by their number, and the scale of scores by the head.
        ("gemma3_text", {"layer_types": None, "query_pre_attn_scalar": 16}),
        ("granite", {}),
        ("olmo2", {}),
        ("lfm2", {}),
        ("lfm2-untied", {}),
        ("gpt_neox", {}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_the_imported_model_is_the_source(tmp_path, name, overrides):
    source = model_of(name, **overrides)
    with torch.no_grad():  # biases, too; of few bits, so that a norm's 1 + weight is exact
        for parameter in source.parameters():
            values = parameter + 0.1 * torch.randn_like(parameter)
            parameter.copy_((1024 * values).round() / 1024)
    model = load_model(str(write_model(tmp_path / "m.gguf", source)))
    assert same_weights(model, source)
    assert torch.equal(logits(model), logits(source))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == source.config.tie_word_embeddings
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ids == (1, 2, None)


def test_layers_that_differ_beyond_a_convolution_are_refused(tmp_path):
    source = model_of("lfm2")
    for counts in ([0, 2, 1], [0, 2], [0, 0, 0]):
        keys = keys_of(source) | {"lfm2.attention.head_count_kv": counts}
        file = write(tmp_path / "m.gguf", keys, tensors_of(source))
        with pytest.raises(
            CheckpointError, match=re.escape(f"head_count_kv is {counts}, expected")
        ):
            load_model(str(file))


def test_llama3_scaling_of_rope_is_recognized(tmp_path):
    shape = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    source = model_of("llama", rope_parameters=LLAMA3, **shape)
    frequencies = LLAMA3["rope_theta"] ** -(np.arange(0, 64, 2) / 64)
    factors = (frequencies / source.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    keys, tensors = keys_of(source), {"rope_freqs.weight": factors, **tensors_of(source)}
    model = load_model(str(write(tmp_path / "m.gguf", keys, tensors)))
    assert model.config.rope_parameters == LLAMA3
    assert torch.equal(logits(model), logits(source))
    tensors["rope_freqs.weight"] = factors * np.linspace(1, 2, 32, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight scales RoPE otherwise"):
        load_model(str(write(tmp_path / "m.gguf", keys, tensors)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_that_is_the_embedding_once_more_is_tied(tmp_path, name):
    source = model_of(name)
    tensors = tensors_of(source)
    tensors["output.weight"] = tensors["token_embd.weight"]
    model = load_model(str(write(tmp_path / "m.gguf", keys_of(source), tensors)))
    assert model.config.tie_word_embeddings
    assert same_weights(model, source)


TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
PLACES = {
    "model.embed_tokens": "token_embd",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.1.self_attn.o_proj": "blk.1.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
    "lm_head": "output",
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_type_is_dequantized_as_by_the_gguf_package(tmp_path, kind, tied):
    kind = Type[kind]
    source = model_of(
        "llama-untied",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        tie_word_embeddings=tied,
        attention_bias=False,
        num_key_value_heads=2,
    )
    tensors, kinds = tensors_of(source), {}
    for seed, (name, values) in enumerate(list(tensors.items())):
        if values.ndim == 2:
            tensors[name], kinds[name] = packed(values, kind, seed), kind
    file = write(tmp_path / "m.gguf", keys_of(source), tensors, kinds)
    model = load_model(str(file))
    for module, place in PLACES.items():
        if module == "lm_head" and tied:
            place = "token_embd"
        expected = gguf.dequantize(tensors[f"{place}.weight"], kind)
        assert np.ptp(expected) > 0
        assert np.array_equal(model.get_submodule(module).weight.detach().numpy(), expected)
    # The rows of q and k are permuted within each head, whatever the type.
    for part, heads in (("q", 4), ("k", 2)):
        rows = gguf.dequantize(tensors[f"blk.1.attn_{part}.weight"], kind)
        weight = (
            model.get_submodule(f"model.layers.1.self_attn.{part}_proj").weight.detach().numpy()
        )
        for head in range(heads):
            ours, theirs = (w[64 * head : 64 * (head + 1)] for w in (weight, rows))
            assert np.array_equal(ours[:32], theirs[0::2])
            assert np.array_equal(ours[32:], theirs[1::2])


# --- the tokenizer


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer_of(pre):
    """As the tokenizer.json of a model has it that llama.cpp's converter gives this name."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return byte_level
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    pattern = LLAMA3_PATTERN if pre == "llama-bpe" else LLAMA3_PATTERN.replace("{1,3}", "")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def byte_level_source(pre):
    """A tokenizer that is trained with the split that `pre` names, with control tokens and another."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer_of(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + 60,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = TEXT + "In 1984 there were 12345 cats;   1999  2001\n\n  10.\r\n x1x2 'LL"
    tokenizer.train_from_iterator([text] * 4, trainer)
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    if pre == "llama-bpe":  # a word that merges do not make
        data["model"]["ignore_merges"] = True
        vocabulary["Ġzebra"] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_tokens(["<think>"])
    return tokenizer


TEXTS = [
    "In 1984 there were 12345 cats",
    "In  1984   there\n\n\n  12 cats\t\t34",
    "x²+3½ Ⅷ ٣٤, naïve Grüße 你好 мир! 🙂🙃",
    "don't I'LL we've 'tis a\r\nb\r\n\r\n c\u3000d\u00a0e",
    "<|im_start|>user\n1<think> 2</s>  ",
    " zebra a zebra",
    "",
]


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def byte_level(request, tmp_path_factory):
    """A tokenizer, and what the import makes of its file."""
    source = byte_level_source(request.param)
    size = source.get_vocab_size() + 3  # the embedding may have more rows
    model = tiny_model(vocab_size=size)
    keys = keys_of(model, source.to_str(), request.param)
    keys["tokenizer.ggml.add_bos_token"] = False
    file = write(tmp_path_factory.mktemp("tokenizer") / "m.gguf", keys, tensors_of(model))
    return source, load_tokenizer(str(file)), file


def test_a_byte_level_tokenizer_is_the_source(byte_level):
    source, tokenizer, _ = byte_level
    assert tokenizer.get_vocab() == source.get_vocab()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == source.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.all_special_tokens == ["<s>", "</s>"]
    assert tokenizer.decode([3, *source.encode("a").ids], skip_special_tokens=True) == "a"


@given(st.text(alphabet=" \n\t\r  aZé1'29.,-_²Ⅷ你🙂s<>|tlv\u3000", max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_level_tokenizer_is_the_source_on_any_text(byte_level, text):
    source, tokenizer, _ = byte_level
    assert tokenizer(text)["input_ids"] == source.encode(text).ids


def test_splits_matter():
    """The four kinds of split give different tokens, so that the tests above can fail."""
    pieces = {
        tuple(p for p, _ in SPLITS[pre].pre_tokenizer().pre_tokenize_str("a  12345\n\nx"))
        for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")
    }
    assert len(pieces) == 4


def test_a_sentencepiece_tokenizer_is_the_source(tmp_path):
    source = Tokenizer.from_str(sentencepiece_tokenizer())
    model = tiny_model(vocab_size=source.get_vocab_size())
    keys = keys_of(model, source.to_str())
    keys["tokenizer.ggml.merges"] = ["b o", "g u s"]  # llama.cpp ignores them here
    tokenizer = load_tokenizer(str(write(tmp_path / "m.gguf", keys, tensors_of(model))))
    assert tokenizer.get_vocab() == source.get_vocab()
    for text in [*TEXTS, "the hell in a he</s> the   end."]:
        ids = tokenizer(text)["input_ids"]
        assert ids == source.encode(text).ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == source.decode(ids)
    keys["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = load_tokenizer(str(write(tmp_path / "m.gguf", keys, tensors_of(model))))
    assert tokenizer.tokenize("he") == ["he"]
    assert tokenizer.decode(tokenizer(" he")["input_ids"], skip_special_tokens=True) == " he"


@pytest.mark.parametrize(
    ("pre", "keys", "before", "after"),
    [
        ("gpt-2", {}, [], []),
        ("gpt-2", {"add_bos_token": True}, [1], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("smollm", {"add_bos_token": False, "add_eos_token": True}, [], [2]),
        (None, {}, [1], []),
        (None, {"add_bos_token": False}, [], []),
        (None, {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        (None, {"bos_token_id": None, "eos_token_id": None}, [1], []),
        ("gpt-2", {"bos_token_id": 2, "eos_token_id": 0, "add_bos_token": True}, [2], []),
    ],
)
def test_what_is_put_around_a_text_is_what_the_file_says(tmp_path, pre, keys, before, after):
    text = sentencepiece_tokenizer() if pre is None else None
    size = Tokenizer.from_str(text).get_vocab_size() if text else VOCABULARY
    model = tiny_model(vocab_size=size)
    changed = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    changed = {**keys_of(model, text, pre or ""), **changed}
    file = str(write(tmp_path / "m.gguf", changed, tensors_of(model)))
    tokenizer, imported = load_tokenizer(file), load_model(file)
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        plain = one("a b", add_special_tokens=False)["input_ids"]
        assert one("a b")["input_ids"] == [*before, *plain, *after]
        assert one("a", "b")["input_ids"][: len(before)] == before
    # None in these tests leaves the key out: llama.cpp then takes 1 and 2 for SentencePiece.
    expected = (keys.get("bos_token_id", 1) or 1, keys.get("eos_token_id", 2))
    expected = (expected[0], 2 if expected[1] is None else expected[1])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == expected
    assert (imported.config.bos_token_id, imported.config.eos_token_id) == expected


# --- commands


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


@pytest.fixture
def file(tmp_path):
    keys = keys_of(model_of()) | {"tokenizer.chat_template": TEMPLATE}
    return write(tmp_path / "foreign.gguf", keys, tensors_of(model_of()))


def test_import_makes_a_folder_as_any_other(shell, tmp_path, file):
    out = shell.succeed("import", file, tmp_path / "model")
    for said in (
        "llama, 3 layers",
        "float32",
        "300 tokens, gpt2 gpt-2",
        "F32",
        "bos <s>",
        "nothing",
    ):
        assert said in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same_weights(model, model_of())
    assert same_weights(load_model(str(tmp_path / "model")), model_of())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == load_tokenizer(str(file))(text)["input_ids"]
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>user\nhi"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    shell.succeed("import", file, tmp_path / "model")  # replaces a model
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.gguf", "model"]


def test_import_keeps_what_is_no_model(shell, tmp_path, file):
    kept = tmp_path / "mine/letter.txt"
    kept.parent.mkdir()
    kept.write_text("dear")
    assert "is there already" in shell.refuse("import", file, kept.parent)
    assert "is there already" in shell.refuse("import", file, kept)
    assert kept.read_text() == "dear"


def test_commands_take_a_file_where_they_take_a_model(shell, tmp_path, file, corpus):
    imported = tmp_path / "model"
    shell.succeed("import", file, imported)
    losses, texts = [], []
    for model in (file, imported):
        out = tmp_path / "loss.json"
        shell.succeed("eval", model, "--task", "perplexity", "--data", corpus / "dev", "--json", out,
                      "--sequence-length", 32)  # fmt: skip
        losses.append(json.loads(out.read_text())["loss"])
        texts.append(shell.succeed("generate", model, "The girl", "--max-new-tokens", 4))
    assert losses[0] == losses[1]
    assert texts[0] == texts[1]
    result = shell.succeed("compare", file, imported, "--no-speed").replace("\n", "")
    assert result.count("PyTorch") == 2
    shell.succeed("quantize", file, tmp_path / "quantized", "--data", corpus / "train")
    recipe = {
        "output": str(tmp_path / "run"),
        "model": str(file),
        "teachers": [str(file), str(imported)],
        "data": {
            "train": str(corpus / "train"),
            "sequence_length": 16,
            "cache": str(tmp_path / "c"),
        },
        "training": {"steps": 2, "batch_size": 4, "precision": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    shell.succeed("train", tmp_path / "recipe.yaml")
    ours = tmp_path / "ours.gguf"
    shell.succeed("export", tmp_path / "run/model", ours)
    assert runs_in_engine(str(ours))
    assert not runs_in_engine(str(file))
    assert shell.succeed("generate", ours, "The girl", "--max-new-tokens", 2).startswith("The girl")


def test_a_file_of_ours_is_no_float_model(shell, tmp_path, corpus):
    ours = tmp_path / "ours.gguf"
    write_gguf(ours, random_model())
    recipe = {
        "output": str(tmp_path / "run"),
        "model": str(ours),
        "data": {"train": str(corpus / "train")},
        "training": {"steps": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for command in (
        ("import", ours, tmp_path / "out"),
        ("quantize", ours, tmp_path / "out"),
        ("train", tmp_path / "recipe.yaml"),
    ):
        message = shell.refuse(*command)
        assert "ours.gguf: is quantized by Squat already" in message
        assert "name the folder" in message
    assert not (tmp_path / "out").exists()


# --- bad input


def without(dictionary, *names):
    return {key: value for key, value in dictionary.items() if key not in names}


def broken(keys, tensors, kinds):
    """What is wrong with a file -> the file's keys, tensors and types, and what is said."""
    gate = "blk.1.ffn_gate.weight"
    values = tensors[gate]
    spoiled = [np.where(np.arange(values.size).reshape(values.shape) == 7, x, values)
               for x in (np.nan, np.inf)]  # fmt: skip
    tokens = keys["tokenizer.ggml.tokens"]
    ggml = "tokenizer.ggml."
    return {
        "architecture": (
            keys | {"general.architecture": "rwkv7"}, tensors, r"architecture 'rwkv7' .* llama, olmo2, qwen2",
        ),
        "experts": (keys | {"llama.expert_count": 8}, tensors, "mixture of experts"),
        "parts": (keys | {"split.count": 3}, tensors, "one of 3 parts .* llama-gguf-split --merge"),
        "missing key": (without(keys, "llama.block_count"), tensors, "llama.block_count is missing"),
        "key of another type": (
            keys | {"llama.attention.head_count": [4, 4, 2]}, tensors, "head_count is a list of 3",
        ),
        "no heads": (keys | {"llama.attention.head_count": 0}, tensors, "head_count is 0"),
        "sizes that do not fit": (
            keys | {"llama.attention.head_count_kv": 3}, tensors, "tensor blk.0.attn_k.weight is",
        ),
        "many layers": (keys | {"llama.block_count": 2**31}, tensors, "block_count is 2147483648"),
        "more layers": (keys | {"llama.block_count": 4}, tensors, r"blk\.3\..* is missing"),
        "fewer layers": (keys | {"llama.block_count": 2}, tensors, r"blk\.2\..* has no place"),
        "half rotated": (keys | {"llama.rope.dimension_count": 4}, tensors, "dimension_count"),
        "rope": (
            keys | {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, tensors,
            "rope.scaling.type: this scaling",
        ),
        "yarn": (
            keys | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
                    "llama.rope.scaling.yarn_beta_fast": 16.0}, tensors, "yarn_beta_fast: this scaling",
        ),
        "missing tensor": (keys, without(tensors, gate), f"tensor {gate} is missing"),
        "no embedding": (
            keys, without(tensors, "token_embd.weight"), "tensor token_embd.weight is missing",
        ),
        "shape": (
            keys, tensors | {gate: values[:, :24].copy()}, rf"{gate} is \[48, 24\], expected \[48, 32\]",
        ),
        "one more tensor": (
            keys, tensors | {"blk.0.attn_sinks.weight": values}, "blk.0.attn_sinks.weight has no place",
        ),
        "bias of q alone": (
            keys, tensors | {"blk.0.attn_q.bias": values[0].copy()}, r"\.bias is missing",
        ),
        "nan": (keys, tensors | {gate: spoiled[0]}, f"tensor {gate} has values that are NaN"),
        "infinite": (keys, tensors | {gate: spoiled[1]}, f"tensor {gate} has values that are NaN or inf"),
        "type": (
            keys, tensors | {gate: values.astype(np.float64)}, f"{gate} is of type F64, .* take the model",
        ),
        "pre": (
            keys | {ggml + "pre": "jabberwocky"}, tensors, "pre is 'jabberwocky': .* known are gpt-2",
        ),
        "no pre": (without(keys, ggml + "pre"), tensors, "tokenizer.ggml.pre is None"),
        "tokenizer": (keys | {ggml + "model": "bert"}, tensors, "'bert', which is not supported"),
        "no tokenizer": (without(keys, ggml + "tokens"), tensors, "ggml.tokens is missing"),
        "tokens": (keys | {ggml + "tokens": [*tokens, "x"]}, tensors, "token_type has 300 elements"),
        "equal tokens": (
            keys | {ggml + "tokens": [*tokens[:9], *tokens[8:-1]]}, tensors, "tokens 8 and 9 are both",
        ),
        "merges": (
            keys | {ggml + "merges": ["a Qqq"]}, tensors, "tokenizer.ggml.merges: .*out of vocabulary",
        ),
        "bos": (keys | {ggml + "bos_token_id": 300}, tensors, "bos_token_id is 300, but there are 300"),
        "no bos": (
            without(keys, ggml + "bos_token_id") | {ggml + "add_bos_token": True}, tensors,
            "bos_token_id is missing",
        ),
    }  # fmt: skip


CASES = list(broken(keys_of(model_of()), tensors_of(model_of()), {}))


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cannot_be_imported_is_refused(shell, tmp_path, case):
    keys, tensors, message = broken(keys_of(model_of()), tensors_of(model_of()), {})[case]
    file = write(tmp_path / "bad.gguf", keys, tensors)
    said = shell.refuse("import", file, tmp_path / "out")
    assert said.startswith(f"squat: {file}: ".replace("\n", ""))
    assert re.search(message, said)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_more_tokens_than_rows_are_refused(tmp_path):
    tensors = tensors_of(model_of())
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:290].copy()
    file = write(tmp_path / "bad.gguf", keys_of(model_of()), tensors)
    with pytest.raises(CheckpointError, match=r"300 tokens, but tensor token_embd\.weight has 290"):
        load_tokenizer(str(file))


def test_a_type_that_does_not_exist_is_refused_with_its_tensor(shell, tmp_path, file):
    data = file.read_bytes()
    name = b"blk.1.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 16  # two sizes, then the type
    file.write_bytes(data[:place] + (77).to_bytes(4, "little") + data[place + 4 :])
    message = shell.refuse("import", file, tmp_path / "out")
    assert "tensor blk.1.ffn_up.weight is of type 77, which cannot be read; take" in message


def test_what_is_no_file_or_no_gguf_is_refused(shell, tmp_path, corpus):
    assert "none.gguf: no such file" in shell.refuse(
        "import", tmp_path / "none.gguf", tmp_path / "o"
    )
    assert "is a folder" in shell.refuse("import", tmp_path, tmp_path / "o")
    empty, text = tmp_path / "empty.gguf", tmp_path / "text.gguf"
    empty.touch()
    text.write_text("a model, honestly\n" * 99)
    for file in (empty, text):
        assert "not a complete GGUF file" in shell.refuse("import", file, tmp_path / "o")
        assert "not a complete GGUF file" in shell.refuse("quantize", file, tmp_path / "o")
        shell.refuse("generate", file, "The")
        shell.refuse("eval", file, "--task", "perplexity", "--data", corpus / "dev")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output: o\nmodel: models/none.gguf\ndata: {train: .}\ntraining: {steps: 1}\n"
    )
    message = shell.refuse("train", recipe)
    assert "recipe.yaml:2: model: models/none.gguf is neither a folder nor a .gguf file" in message
    assert not (tmp_path / "o").exists()


def test_a_file_cut_short_anywhere_is_refused(tmp_path, file):
    data = file.read_bytes()
    rng = random.Random(0)
    cuts = [0, 3, 4, 23, 24, 25, len(data) - 1, *(rng.randrange(len(data)) for _ in range(60))]
    for cut in cuts:
        file.write_bytes(data[:cut])
        for load in (load_model, load_tokenizer):
            with pytest.raises(CheckpointError) as caught:
                load(str(file))
            assert str(caught.value).startswith(f"{file}: ")
            assert "\n" not in str(caught.value)


def spoil(rng, data, end):
    """Before `end`: another byte, a number that is extreme, bytes that are missing, or some twice."""
    spoiled, at = bytearray(data), rng.randrange(end)
    kind = rng.randrange(4)
    if kind == 0:
        spoiled[at] = rng.randrange(256)
    elif kind == 1:
        number = rng.choice([0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
        spoiled[at : at + 8] = number.to_bytes(8, "little")
    elif kind == 2:
        del spoiled[at : at + rng.randint(1, 16)]
    else:
        spoiled[at:at] = spoiled[: rng.randint(1, 64)]
    return bytes(spoiled)


def test_bytes_that_are_wrong_are_refused_or_harmless(tmp_path, file):
    data = file.read_bytes()
    head = data.index(b"output_norm.weight")  # what comes before is keys and tensors' places
    rng = random.Random(1)

    def load():
        load_tokenizer(str(file))
        load_model(str(file))

    refused = 0
    for _ in range(150):
        file.write_bytes(spoil(rng, data, head))
        with contextlib.suppress(CheckpointError):
            load()
            continue
        refused += 1
        with pytest.raises(CheckpointError, match=re.escape(str(file))) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert refused > 20


def test_a_tensor_whose_name_is_two_lines_is_refused_in_one(tmp_path):
    tensors = tensors_of(model_of()) | {"blk.0.\nmore": np.zeros(8, np.float32)}
    file = write(tmp_path / "m.gguf", keys_of(model_of()), tensors)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.\\nmore has no place"):
        load_model(str(file))


def test_a_merge_that_is_no_token_is_refused_in_one_line(tmp_path):
    keys = keys_of(model_of())
    keys["tokenizer.ggml.merges"] = [*keys["tokenizer.ggml.merges"], "\n \n"]
    file = write(tmp_path / "m.gguf", keys, tensors_of(model_of()))
    with pytest.raises(CheckpointError, match=r"merges: .*vocabulary") as caught:
        load_tokenizer(str(file))
    assert "\n" not in str(caught.value)


# --- real files, and llama.cpp


def greedy(model, tokenizer, text, count):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    answer = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(answer)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(shell, tmp_path):
    file = smollm2()
    shell.succeed("import", file, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert same_weights(model, load_model(str(file)))
    assert "Paris" in greedy(model, tokenizer, "The capital of France is", 8)
    assert "Paris" in shell.succeed("generate", file, "The capital of France is")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer("In  1984 there were 12345 cats")["input_ids"]
    pieces = ["In", "ĠĠ", *"1984", "Ġthere", "Ġwere", "Ġ", *"12345", "Ġcats"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n")
    assert "Paris" in greedy(model, tokenizer, prompt, 12)


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def texts_of(seed, count):
    rng = random.Random(seed)
    alphabet = " \n\t  aZé1'29.,-_²Ⅷ你🙂"
    made = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]
    return [*TEXTS, *made]


def theirs(other, text):
    return other.tokenize(text.encode(), add_bos=False, special=True)


@pytest.mark.slow
def test_smollm2_has_the_ids_that_llama_cpp_gives(llama_cpp):
    file = str(smollm2())
    other = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(file)
    for text in texts_of(0, 2000):
        assert tokenizer(text)["input_ids"] == theirs(other, text), text
    assert other.tokenize(b"a", add_bos=True) == tokenizer("a")["input_ids"]


@pytest.mark.slow
def test_tokenizers_have_the_ids_that_llama_cpp_gives(llama_cpp, byte_level):
    _, tokenizer, file = byte_level
    other = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in texts_of(1, 500):
        assert tokenizer(text)["input_ids"] == theirs(other, text), text


@pytest.mark.slow
def test_sentencepiece_has_the_ids_that_llama_cpp_gives(llama_cpp, tmp_path):
    text = sentencepiece_tokenizer()
    model = tiny_model(vocab_size=Tokenizer.from_str(text).get_vocab_size())
    file = str(write(tmp_path / "m.gguf", keys_of(model, text), tensors_of(model)))
    other = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(file)
    for text in texts_of(2, 500):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(other, text), text
    assert other.tokenize(b"he", add_bos=True) == tokenizer("he")["input_ids"]


IN_LLAMA_CPP = ["llama", "llama-untied", "qwen2", "qwen3", "smollm3", "gpt2", "granite", "olmo2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_logits_are_llama_cpps(llama_cpp, tmp_path, name):
    """Where rows of q and k go, biases, layers without RoPE: an error in one changes the logits."""
    layers = {"num_hidden_layers": 4, "no_rope_layers": None} if name == "smollm3" else {}
    source = model_of(name, hidden_size=128, **layers)
    file = str(write_model(tmp_path / "m.gguf", source))
    ids = some_ids(1, 40, vocab=VOCABULARY)
    other = llama_cpp.Llama(file, n_ctx=64, logits_all=True, verbose=False)
    other.eval(ids[0].tolist())
    expected = np.array(other.scores[:40])
    with torch.no_grad():
        found = load_model(file)(ids).logits[0].numpy()
    assert np.abs(found - expected).max() < 0.02 * expected.std()
