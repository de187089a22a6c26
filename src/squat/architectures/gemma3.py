"""Gemma 3, its text model: four norms a layer, norms of queries and keys, two kinds of layers.

Most layers attend to a window and are rotated with a base of their own, every sixth attends to everything.
Norms multiply by 1 + weight; the embedding, which is the head's matrix too, is scaled by a constant.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from squat.architectures.llama import LLAMA, windows
from squat.architectures.qwen3 import QK_NORMS
from squat.deploy.gguf import GgufGraph
from squat.exact import ExactCenteredRMSNorm, ExactRotary, exact_activation

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **QK_NORMS,
}
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _graph(config: Any) -> GgufGraph:
    local = config.rope_parameters[_LOCAL]
    return GgufGraph(
        activation="gelu_tanh",
        pairs="halves",
        rope=dict(config.rope_parameters[_GLOBAL]),
        rotation=[1 if kind == _GLOBAL else 2 for kind in config.layer_types],
        second_base=local["rope_theta"],
        windows=windows(config),
        embedding_scale=float(np.float32(math.sqrt(config.hidden_size))),
        attention_scale=config.query_pre_attn_scalar**-0.5,
    )


GEMMA3 = replace(
    LLAMA,
    exact={"mlp.act_fn": exact_activation, **dict.fromkeys(_NORMS, ExactCenteredRMSNorm)},
    model_exact={"model.norm": ExactCenteredRMSNorm, "model.rotary_emb": ExactRotary},
    gguf="gemma3",
    layer_names=LLAMA.layer_names | _NORMS,
    graph=_graph,
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    keys=lambda config: {"attention.sliding_window": config.sliding_window},
)
