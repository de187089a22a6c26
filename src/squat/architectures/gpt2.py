"""GPT-2: LayerNorm, learned positions, one matrix for queries, keys and values, an MLP without a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from squat.architectures.architecture import ACTIVATIONS, Architecture
from squat.architectures.fields import layers_of, size
from squat.deploy.gguf import GgufGraph
from squat.exact import ExactLayerNorm, exact_activation

if TYPE_CHECKING:
    from squat.importing.file import GgufFile


def _graph(config: Any) -> GgufGraph:
    activation = ACTIVATIONS.get(config.activation_function, "gelu_tanh")
    return GgufGraph(norm="layer", activation=activation, rotated=0)


def _fields(file: GgufFile, name: str) -> dict[str, Any]:
    return {
        "n_embd": size(file, f"{name}.embedding_length"),
        "n_inner": size(file, f"{name}.feed_forward_length"),
        "n_layer": layers_of(file, name),
        "n_head": size(file, f"{name}.attention.head_count"),
        "n_positions": size(file, f"{name}.context_length"),
        "layer_norm_epsilon": file.need(f"{name}.attention.layer_norm_epsilon", float),
    }


GPT2 = Architecture(
    attention="attn",
    inputs={
        "attn_in": "attn",
        "attn_out": "attn.c_proj",
        "mlp_in": "mlp",
        "mlp_mid": "mlp.c_proj",
    },
    readers={
        "attn_in": ("attn.c_attn",),
        "attn_out": ("attn.c_proj",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_mid": ("mlp.c_proj",),
    },
    value="attn.c_attn",
    exact={"ln_1": ExactLayerNorm, "ln_2": ExactLayerNorm, "mlp.act": exact_activation},
    layers="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    norm="transformer.ln_f",
    head="lm_head",
    model_exact={"transformer.ln_f": ExactLayerNorm},
    gguf="gpt2",
    layer_names={
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
    },
    model_names={
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    graph=_graph,
    fields=_fields,
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    epsilon="layer_norm_epsilon",
    makers={"attn_in": "ln_1", "mlp_in": "ln_2"},
)
