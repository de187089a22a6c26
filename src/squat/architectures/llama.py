"""Llama, and what is built like it: Mistral, Qwen2; the models after them depart from this one.

RMSNorm before attention and MLP, rotated queries and keys, a gated MLP with SiLU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from squat.architectures.architecture import ACTIVATIONS, Architecture
from squat.architectures.fields import decoder_fields
from squat.deploy.gguf import GgufGraph
from squat.exact import ExactRMSNorm, ExactRotary, exact_activation


def windows(config: Any) -> list[int] | None:
    """How many tokens each layer attends to, itself among them; 0: all. None: every layer attends to all."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    sizes = [window if kind == "sliding_attention" else 0 for kind in kinds]
    return sizes if any(sizes) else None


def graph(config: Any) -> GgufGraph:
    """What a Llama computes."""
    return GgufGraph(
        activation=ACTIVATIONS.get(config.hidden_act, "silu"),
        rope=dict(config.rope_parameters),
        windows=windows(config),
    )


LLAMA = Architecture(
    attention="self_attn",
    inputs={
        "attn_in": "self_attn",
        "attn_out": "self_attn.o_proj",
        "mlp_in": "mlp",
        "mlp_mid": "mlp.down_proj",
    },
    readers={
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_mid": ("mlp.down_proj",),
    },
    value="self_attn.v_proj",
    exact={
        "input_layernorm": ExactRMSNorm,
        "post_attention_layernorm": ExactRMSNorm,
        "mlp.act_fn": exact_activation,
    },
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    norm="model.norm",
    head="lm_head",
    model_exact={"model.norm": ExactRMSNorm, "model.rotary_emb": ExactRotary},
    gguf="llama",
    layer_names={
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    model_names={
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    },
    graph=graph,
    fields=decoder_fields,
    only={"hidden_act": tuple(ACTIVATIONS)},
    makers={
        "attn_in": "input_layernorm",
        "mlp_in": "post_attention_layernorm",
        "mlp_mid": "mlp.up_proj",
    },
)

MISTRAL = LLAMA
"""In files of llama.cpp it is a Llama."""


def halves(config: Any) -> GgufGraph:
    """A Llama whose rows of q and k are in transformers' order in a file, too."""
    return replace(graph(config), pairs="halves")


QWEN2 = replace(LLAMA, gguf="qwen2", graph=halves)
"""With biases of q, k and v."""


def _smollm3(config: Any) -> GgufGraph:
    return replace(graph(config), rotation=[int(rotated) for rotated in config.no_rope_layers])


SMOLLM3 = replace(LLAMA, gguf="smollm3", graph=_smollm3)
"""Llama with layers whose queries and keys are not rotated."""
