"""OLMo 2: norms behind attention and MLP instead of before them, and of all queries and all keys together."""

from __future__ import annotations

from dataclasses import replace

from squat.architectures.llama import LLAMA, halves
from squat.architectures.qwen3 import QK_NORMS
from squat.exact import ExactRMSNorm, exact_activation

_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **QK_NORMS,
}
_MATRICES = {path: name for path, name in LLAMA.layer_names.items() if path.endswith("_proj")}

OLMO2 = replace(
    LLAMA,
    exact={"mlp.act_fn": exact_activation, **dict.fromkeys(_NORMS, ExactRMSNorm)},
    gguf="olmo2",
    layer_names=_MATRICES | _NORMS,
    graph=halves,
    makers={"mlp_mid": "mlp.up_proj"},
)
