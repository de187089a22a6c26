"""GPT-NeoX and Pythia: LayerNorm, attention and MLP side by side, heads that are rotated in part.

One matrix makes queries, keys and values, head after head; in a file it has all queries first, then all keys.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from squat.architectures.architecture import ACTIVATIONS, Architecture
from squat.deploy.gguf import GgufGraph
from squat.exact import ExactLayerNorm, ExactRotary, exact_activation


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
    only={"hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh")},
    epsilon="layer_norm_eps",
    keys=lambda config: {"use_parallel_residual": config.use_parallel_residual},
    value_rows=_value_rows,
    file_order={"attention.query_key_value": _by_part},
)
