"""GPT-NeoX and Pythia: LayerNorm, attention and MLP side by side, heads that are rotated in part.

One matrix makes queries, keys and values, head after head; in a file it has all queries first, then all keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from squat.architectures.architecture import ACTIVATIONS, Architecture
from squat.architectures.fields import layers_of, rope_of, size
from squat.deploy.gguf import GgufGraph
from squat.exact import ExactLayerNorm, ExactRotary, exact_activation

if TYPE_CHECKING:
    from squat.importing.file import GgufFile


def _rotated(config: Any) -> int:
    size = config.hidden_size // config.num_attention_heads
    return int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _graph(config: Any) -> GgufGraph:
    return GgufGraph(
        norm="layer",
        activation=ACTIVATIONS.get(config.hidden_act, "gelu"),
        parallel=config.use_parallel_residual,
        pairs="halves",
        rotated=_rotated(config),
        rope=dict(config.rope_parameters),
    )


def _value_rows(made: Tensor, heads: int, size: int) -> Tensor:
    return made.unflatten(0, (heads, 3, size))[:, 2]


def _by_part(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    return rows.reshape(heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _fields(file: GgufFile, name: str) -> dict[str, Any]:
    hidden = size(file, f"{name}.embedding_length")
    heads = size(file, f"{name}.attention.head_count")
    rotated = size(file, f"{name}.rope.dimension_count") / max(1, hidden // heads)
    return {
        "hidden_size": hidden,
        "intermediate_size": size(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": layers_of(file, name),
        "num_attention_heads": heads,
        "max_position_embeddings": size(file, f"{name}.context_length"),
        "layer_norm_eps": file.need(f"{name}.attention.layer_norm_epsilon", float),
        "use_parallel_residual": file.need(f"{name}.use_parallel_residual", bool),
        "rope_parameters": rope_of(file, name) | {"partial_rotary_factor": rotated},
    }


def _from_file(path: str, values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    if ".query_key_value." not in path:
        return values
    parts = values.reshape(3, config.num_attention_heads, -1, *values.shape[1:])
    return parts.swapaxes(0, 1).reshape(values.shape)


GPT_NEOX = Architecture(
    attention="attention",
    inputs={
        "attn_in": "attention",
        "attn_out": "attention.dense",
        "mlp_in": "mlp",
        "mlp_mid": "mlp.dense_4h_to_h",
    },
    readers={
        "attn_in": ("attention.query_key_value",),
        "attn_out": ("attention.dense",),
        "mlp_in": ("mlp.dense_h_to_4h",),
        "mlp_mid": ("mlp.dense_4h_to_h",),
    },
    value="attention.query_key_value",
    exact={
        "input_layernorm": ExactLayerNorm,
        "post_attention_layernorm": ExactLayerNorm,
        "mlp.act": exact_activation,
    },
    layers="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    norm="gpt_neox.final_layer_norm",
    head="lm_head",
    model_exact={
        "gpt_neox.final_layer_norm": ExactLayerNorm,
        "gpt_neox.rotary_emb": ExactRotary,
    },
    gguf="gptneox",
    layer_names={
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    model_names={
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "lm_head": "output",
    },
    graph=_graph,
    fields=_fields,
    only={"hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh")},
    epsilon="layer_norm_eps",
    makers={"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    keys=lambda config: {"use_parallel_residual": config.use_parallel_residual},
    value_rows=_value_rows,
    from_file=_from_file,
    file_order={"attention.query_key_value": _by_part},
)
