"""Config and weights of a .gguf file, as a model of transformers.

What an architecture of llama.cpp is in transformers stands in `squat.architectures`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from squat.architectures import ARCHITECTURES, Architecture
from squat.deploy.gguf import unpermute_rope_rows
from squat.errors import CheckpointError
from squat.importing.file import GgufFile, printable
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


def read_model(file: GgufFile) -> PreTrainedModel:
    """The model of a .gguf file: float32, in eval mode.

    Raises:
        CheckpointError: not the whole model, or one that is not supported; with the key or tensor.
    """
    name = file.need("general.architecture", str)
    rows = {row.gguf: (kind, row) for kind, row in reversed(ARCHITECTURES.items())}
    if name not in rows:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported; {', '.join(sorted(rows))} are"
        )
    model_type, row = rows[name]
    config = _config(file, name, model_type, row)
    try:
        with torch.device("meta"):  # shapes only
            shapes: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a size that is not possible leads to
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{file.path}: its sizes make no {name} model ({cause})") from None
    weights = _weights(file, row, shapes)
    model = type(shapes).from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32
    )
    model.config.name_or_path = file.path
    return model.eval()


def _config(file: GgufFile, name: str, model_type: str, row: Architecture) -> PreTrainedConfig:
    if (file.get(f"{name}.expert_count", int) or 0) > 0:
        raise CheckpointError(f"{file.path}: is a mixture of experts, which is not supported")
    special = special_ids(file)
    fields = {
        "vocab_size": file.shape(EMBEDDING)[0],
        "tie_word_embeddings": _is_tied(file),
        **{f"{role}_token_id": special.get(role) for role in ("bos", "eos", "pad")},
        **row.fields(file, name),
    }
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # transformers checks some values
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{file.path}: its sizes make no {name} model ({cause})") from None
    if ROPE_FACTORS in file.tensors:
        _take_rope_factors(file, config)
    return config


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


def _weights(file: GgufFile, row: Architecture, model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of a model, in which every tensor of the file has its place."""
    config = model.config
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[f"{row.head}.weight"]
    tensors = row.tensors(model)
    places = {}
    for key in expected:
        path, _, kind = key.rpartition(".")
        places[key] = f"{tensors[path]}.{kind}"
    known = {*places.values(), HEAD, ROPE_FACTORS}
    unknown = next((tensor for tensor in file.tensors if tensor not in known), None)
    if unknown is not None:
        raise CheckpointError(
            f"{file.path}: tensor {printable(unknown)} has no place in a {config.model_type} model of "
            f"{config.num_hidden_layers} layers; this kind of model is not supported"
        )
    transposed = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)
    }
    permuted = row.graph(config).pairs == "adjacent"
    state = {}
    with progress("Reading weights") as show:
        for done, (key, tensor) in enumerate(places.items()):
            show(done, len(places))
            # A depthwise convolution has a dimension of 1 that files leave out.
            shape = tuple(size for i, size in enumerate(expected[key]) if i != 1 or size != 1)
            values = file.weights(tensor, shape[:: -1 if key in transposed else 1])
            if permuted and ".q_proj." in key:
                values = unpermute_rope_rows(values, config.num_attention_heads)
            if permuted and ".k_proj." in key:
                values = unpermute_rope_rows(values, config.num_key_value_heads)
            values = row.from_file(key, values.T if key in transposed else values, config)
            state[key] = torch.from_numpy(np.ascontiguousarray(values)).view(expected[key])
    return state
