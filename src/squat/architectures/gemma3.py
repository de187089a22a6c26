"""Gemma 3, its text model: four norms a layer, norms of queries and keys, two kinds of layers.

Most layers attend to a window and are rotated with a base of their own, every sixth attends to everything.
Norms multiply by 1 + weight; the embedding, which is the head's matrix too, is scaled by a constant.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from squat.architectures.fields import decoder_fields, size
from squat.architectures.llama import LLAMA, windows
from squat.architectures.qwen3 import QK_NORMS
from squat.deploy.gguf import GgufGraph
from squat.exact import ExactCenteredRMSNorm, ExactRotary, exact_activation

if TYPE_CHECKING:
    from squat.importing.file import GgufFile

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


def _fields(file: GgufFile, name: str) -> dict[str, Any]:
    fields = decoder_fields(file, name)
    # What llama.cpp knows by the architecture's name, too: every sixth layer, the local base, the scale.
    return fields | {
        "sliding_window": size(file, f"{name}.attention.sliding_window"),
        "rope_parameters": {
            _GLOBAL: fields["rope_parameters"],
            _LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
        },
        "query_pre_attn_scalar": fields["head_dim"],
    }


def _from_file(path: str, values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    return values - np.float32(1) if path.endswith("norm.weight") else values


GEMMA3 = replace(
    LLAMA,
    exact={"mlp.act_fn": exact_activation, **dict.fromkeys(_NORMS, ExactCenteredRMSNorm)},
    model_exact={"model.norm": ExactCenteredRMSNorm, "model.rotary_emb": ExactRotary},
    gguf="gemma3",
    layer_names=LLAMA.layer_names | _NORMS,
    graph=_graph,
    fields=_fields,
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    keys=lambda config: {"attention.sliding_window": config.sliding_window},
    from_file=_from_file,
    makers=LLAMA.makers | {"mlp_in": "pre_feedforward_layernorm"},
)
