"""Config and weights of a .gguf file, as a model of transformers.

What an architecture of llama.cpp is in transformers is one row of `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from squat.deploy.gguf import unpermute_rope_rows
from squat.errors import CheckpointError
from squat.importing.file import GgufFile
from squat.importing.tokenizer import special_ids
from squat.terminal import progress

HEAD, EMBEDDING, ROPE_FACTORS = "output.weight", "token_embd.weight", "rope_freqs.weight"
_PUBLISHED_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Llama 3.1's and 3.2's scaling of RoPE; its factor stands in the file."""


@dataclass(frozen=True)
class _Architecture:
    """What one of llama.cpp's architectures is in transformers.

    model_type: transformers' name.
    fields: the fields of its config, from the file's keys.
    names: the gguf package's table of tensor names.
    permuted: whether llama.cpp has the rows of q and k in its own order.
    """

    model_type: str
    fields: Callable[[GgufFile, str], dict[str, Any]]
    names: gguf.MODEL_ARCH
    permuted: bool = False


def read_model(file: GgufFile) -> PreTrainedModel:
    """The model of a .gguf file: float32, in eval mode.

    Raises:
        CheckpointError: not the whole model, or one that is not supported; with the key or tensor.
    """
    name = file.need("general.architecture", str)
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported; {', '.join(ARCHITECTURES)} are"
        )
    config = _config(file, name, architecture)
    try:
        with torch.device("meta"):  # shapes only
            shapes: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a size that is not possible leads to
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{file.path}: its sizes make no {name} model ({cause})") from None
    weights = _weights(file, architecture, shapes)
    model = type(shapes).from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32
    )
    model.config.name_or_path = file.path
    return model.eval()


def _config(file: GgufFile, name: str, architecture: _Architecture) -> PreTrainedConfig:
    if (file.get(f"{name}.expert_count", int) or 0) > 0:
        raise CheckpointError(f"{file.path}: is a mixture of experts, which is not supported")
    special = special_ids(file)
    fields = {
        "vocab_size": file.shape(EMBEDDING)[0],
        "tie_word_embeddings": _is_tied(file),
        **{f"{role}_token_id": special.get(role) for role in ("bos", "eos", "pad")},
        **architecture.fields(file, name),
    }
    try:
        config = AutoConfig.for_model(architecture.model_type, **fields)
    except Exception as error:  # transformers checks some values
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{file.path}: its sizes make no {name} model ({cause})") from None
    if ROPE_FACTORS in file.tensors:
        _take_rope_factors(file, config)
    return config


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    """A size, which is positive."""
    value = file.need(key, int) if default is None else file.get(key, int)
    if value is None:
        assert default is not None
        return default
    if value < 1:
        raise CheckpointError(f"{file.path}: key {key} is {value}, expected a positive number")
    return value


def _layers(file: GgufFile, name: str) -> int:
    layers = _size(file, f"{name}.block_count")
    if layers > len(file.tensors):
        raise CheckpointError(
            f"{file.path}: key {name}.block_count is {layers}, but there are {len(file.tensors)} tensors; "
            "take another copy"
        )
    return layers


def _llama_fields(file: GgufFile, name: str) -> dict[str, Any]:
    """The fields of everything that is built like a Llama."""
    hidden, heads = (
        _size(file, f"{name}.embedding_length"),
        _size(file, f"{name}.attention.head_count"),
    )
    head_dim = _size(file, f"{name}.attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(file, f"{name}.{key}", head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: key {name}.{key} is another than the {head_dim} elements of a head, which "
                "is not supported"
            )
    fields = {
        "hidden_size": hidden,
        "intermediate_size": _size(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": _layers(file, name),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, f"{name}.attention.head_count_kv", heads),
        "max_position_embeddings": _size(file, f"{name}.context_length"),
        "rms_norm_eps": file.need(f"{name}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(file, name),
    }
    # Qwen2 has no such field, but heeds it.
    if name != "qwen2" or head_dim * heads != hidden:
        fields["head_dim"] = head_dim
    if name != "qwen2" and "blk.0.attn_q.bias" in file.tensors:
        fields["attention_bias"] = True
    if "blk.0.ffn_gate.bias" in file.tensors:
        fields["mlp_bias"] = True
    return fields


def _gpt2_fields(file: GgufFile, name: str) -> dict[str, Any]:
    return {
        "n_embd": _size(file, f"{name}.embedding_length"),
        "n_inner": _size(file, f"{name}.feed_forward_length"),
        "n_layer": _layers(file, name),
        "n_head": _size(file, f"{name}.attention.head_count"),
        "n_positions": _size(file, f"{name}.context_length"),
        "layer_norm_epsilon": file.need(f"{name}.attention.layer_norm_epsilon", float),
    }


ARCHITECTURES = {
    "llama": _Architecture("llama", _llama_fields, gguf.MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": _Architecture("qwen2", _llama_fields, gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Architecture("qwen3", _llama_fields, gguf.MODEL_ARCH.QWEN3),
    "smollm3": _Architecture("smollm3", _llama_fields, gguf.MODEL_ARCH.LLAMA, permuted=True),
    "gpt2": _Architecture("gpt2", _gpt2_fields, gguf.MODEL_ARCH.GPT2),
}
"""By `general.architecture`. Mistral's models are llama there."""


def _rope(file: GgufFile, name: str) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    base = file.get(f"{name}.rope.freq_base", float)
    if base is not None:
        rope["rope_theta"] = base
    scaling = f"{name}.rope.scaling."
    known = {scaling + key for key in ("type", "factor", "original_context_length", "finetuned")}
    unknown = [key for key in file.keys(scaling) if key not in known]
    # llama.cpp's type, where there is only a factor, is linear.
    kind = file.get(f"{scaling}type", str) or "linear"
    factor = file.get(f"{scaling}factor", float)
    if kind == "none" or not factor:
        return rope
    if unknown or kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{file.path}: key {next(iter(unknown), scaling + 'type')}: this scaling of RoPE is not "
            "supported; linear, yarn with its usual settings, and llama3's are"
        )
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        context = _size(file, f"{name}.context_length")
        original = _size(file, f"{scaling}original_context_length", context)
        rope["original_max_position_embeddings"] = original
    return rope


def _take_rope_factors(file: GgufFile, config: PreTrainedConfig) -> None:
    """Give the config the scaling whose effect on each frequency stands in the file."""
    pairs = config.head_dim // 2
    factors = file.weights(ROPE_FACTORS, (pairs,))
    if (factors == 1).all():
        return
    default = config.rope_parameters
    if default["rope_type"] == "default":
        frequencies = default["rope_theta"] ** -(np.arange(pairs) / pairs)
        config.rope_parameters = default | _PUBLISHED_LLAMA3 | {"factor": float(factors.max())}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        if np.allclose(frequencies / scaled.double().numpy(), factors, rtol=1e-4):
            return
    raise CheckpointError(
        f"{file.path}: tensor {ROPE_FACTORS} scales RoPE otherwise than Llama 3 does, which is not supported"
    )


def _is_tied(file: GgufFile) -> bool:
    """Whether the head is the embedding: it is missing, or the same once more."""
    if HEAD not in file.tensors:
        return True
    head, embedding = file.tensors[HEAD], file.tensors[EMBEDDING]
    same = head.tensor_type == embedding.tensor_type
    return same and np.array_equal(head.data, embedding.data)


def _weights(
    file: GgufFile, architecture: _Architecture, model: PreTrainedModel
) -> dict[str, Tensor]:
    """The state of a model, in which every tensor of the file has its place."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture.names, config.num_hidden_layers)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    places = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in expected}
    known = {*places.values(), HEAD, ROPE_FACTORS}
    unknown = next((tensor for tensor in file.tensors if tensor not in known), None)
    if unknown is not None:
        raise CheckpointError(
            f"{file.path}: tensor {unknown} has no place in a {config.model_type} model of "
            f"{config.num_hidden_layers} layers; this kind of model is not supported"
        )
    transposed = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)
    }
    state = {}
    with progress("Reading weights") as show:
        for done, (key, tensor) in enumerate(places.items()):
            show(done, len(places))
            assert tensor is not None, key
            shape = expected[key][::-1] if key in transposed else expected[key]
            values: NDArray[np.float32] = file.weights(tensor, shape)
            if architecture.permuted and ".q_proj." in key:
                values = unpermute_rope_rows(values, config.num_attention_heads)
            if architecture.permuted and ".k_proj." in key:
                values = unpermute_rope_rows(values, config.num_key_value_heads)
            if key in transposed:
                values = values.T
            state[key] = torch.from_numpy(np.ascontiguousarray(values))
    return state
