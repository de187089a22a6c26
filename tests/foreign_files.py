"""Small .gguf files as other programs write them, from small models of transformers.

What stands in a file is two dictionaries, keys and tensors, that a test may change before they are written.
Names are those of the exporter's table, the order of q's and k's rows is llama.cpp's converter's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine_models import byte_level_tokenizer
from squat.architectures import architecture_of
from squat.deploy.tokenizer import TokenType, ggml_tokenizer

Type = gguf.GGMLQuantizationType
Keys = dict[str, Any]
Tensors = dict[str, NDArray[Any]]

HALVES = ("qwen2", "qwen3", "gemma3_text", "olmo2", "lfm2", "gpt_neox")
"""Whose rows of q and k llama.cpp leaves as they are."""
_ROPE = {"factor": "factor", "original_max_position_embeddings": "original_context_length"}


def keys_of(model: PreTrainedModel, tokenizer: str | None = None, pre: str = "gpt-2") -> Keys:
    """The keys of a model and of a tokenizer.json; by default that of a byte-level BPE."""
    config = model.config
    row = architecture_of(config.model_type)
    name, rope = row.gguf, getattr(config, "rope_parameters", None)
    if name == "gemma3":
        rope = rope["full_attention"]
    if name == "gpt2":
        shape: Keys = {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    elif name == "gptneox":
        head_dim = config.hidden_size // config.num_attention_heads
        shape = {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
            "rope.freq_base": float(rope["rope_theta"]),
        }
    else:
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        shape = {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.layer_norm_rms_epsilon": getattr(config, row.epsilon),
            "rope.dimension_count": head_dim,
            "rope.freq_base": float(rope["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        if name == "lfm2":
            kinds = [kind == "full_attention" for kind in config.layer_types]
            shape["attention.head_count_kv"] = [config.num_key_value_heads * kind for kind in kinds]
        kind = rope["rope_type"]
        if kind in ("linear", "yarn"):
            shape["rope.scaling.type"] = kind
            for ours, theirs in _ROPE.items():
                if ours in rope:
                    shape[f"rope.scaling.{theirs}"] = rope[ours]
    shape |= row.keys(config)
    shape |= {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": tensors_of(model)["blk.0.ffn_down.weight"].shape[1],
        "attention.head_count": config.num_attention_heads,
    }
    text = tokenizer or byte_level_tokenizer(config.vocab_size, prefix=False)
    return {
        "general.architecture": name,
        "general.name": "tiny",
        **{f"{name}.{key}": value for key, value in shape.items()},
        **tokenizer_keys(text, config.vocab_size, pre),
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }


def tokenizer_keys(text: str, vocab_size: int, pre: str) -> Keys:
    """The keys of a tokenizer.json; `pre` names the pattern of a byte-level BPE."""
    data = json.loads(text)
    if data["model"].get("byte_fallback"):
        made = ggml_tokenizer(text, vocab_size)
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": made.tokens,
            "tokenizer.ggml.token_type": made.types,
            "tokenizer.ggml.scores": made.scores,
        }
    tokens = {index: token for token, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = kind
    ids = range(vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in ids],
        "tokenizer.ggml.token_type": [int(types.get(i, TokenType.UNUSED)) for i in ids],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
    }


def tensors_of(model: PreTrainedModel) -> Tensors:
    """A model's weights by llama.cpp's names, in its order of rows."""
    config = model.config
    row = architecture_of(config.model_type)
    modules = dict(model.named_modules())
    places = dict(row.model_names)
    if config.tie_word_embeddings:
        del places["lm_head"]
    for index, layer in enumerate(model.get_submodule(row.layers).children()):
        for path, place in row.of(layer).layer_names.items():
            places[f"{row.layers}.{index}.{path}"] = f"blk.{index}.{place}"
    tensors = {}
    for path, place in places.items():
        module = modules[path]
        for kind, parameter in module.named_parameters(recurse=False):
            values = parameter.detach()
            if kind == "weight" and isinstance(module, Conv1D):
                values = values.T
            adjacent = config.model_type not in HALVES
            if adjacent and place.endswith(("attn_q", "attn_k")):
                heads = config.num_attention_heads
                heads = heads if place.endswith("q") else config.num_key_value_heads
                values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            if path.endswith("conv.conv"):
                values = values.squeeze(1)
            if path.endswith("query_key_value"):
                heads = (config.num_attention_heads, 3, -1)
                values = values.unflatten(0, heads).transpose(0, 1).flatten(0, 2)
            if config.model_type == "gemma3_text" and place.endswith("norm"):
                values = values + 1
            tensors[f"{place}.{kind}"] = values.contiguous().numpy()
    return tensors


def packed(values: NDArray[np.float32], kind: Type, seed: int = 0) -> NDArray[Any]:
    """The bytes of a tensor of a type; where the gguf package does not quantize, blocks at random."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:  # the gguf package's word for a type that it only reads
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(seed)
        blocks = rng.integers(
            0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8
        )
        # Scales are fp16: two at the start, of Q6_K one at the end. 0x1b and below: less than 0.004.
        scales = (size - 1,) if kind == Type.Q6_K else (1, 3)
        blocks[..., scales] = rng.integers(0x10, 0x1C, (*blocks.shape[:-1], len(scales)), np.uint8)
        return blocks.reshape(*values.shape[:-1], -1)


def write(path: Path, keys: Keys, tensors: Tensors, kinds: dict[str, Type] | None = None) -> Path:
    """A file with these keys and tensors; `kinds` of a tensor whose array holds packed bytes."""
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: PreTrainedModel, **keys: Any) -> Path:
    """A float32 model's file; keyword arguments are keys of `tokenizer.ggml.`."""
    changed = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return write(path, {**keys_of(model), **changed}, tensors_of(model))


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
