"""LFM2: a short convolution in place of attention in most layers; the others attend as Qwen3's do.

The convolution's block gates its input, mixes each channel with its last few tokens, and gates the result.
Its two projections are quantized as those around attention are, at the same sites; what is between them is
float32 (docs/format.md, "Graph").
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.lfm2.modeling_lfm2 import (
    Lfm2MLP,
    Lfm2ShortConv,
    apply_mask_to_padding_states,
)

from squat.architectures.fields import layers_of, rope_of, size
from squat.architectures.llama import LLAMA
from squat.deploy.gguf import GgufGraph
from squat.errors import CheckpointError
from squat.exact import ExactRMSNorm, ExactRotary, is_exact, short_convolution, silu

if TYPE_CHECKING:
    from squat.importing.file import GgufFile

_ATTENTION, _CONVOLUTION = "full_attention", "conv"


class _ExactMLP(Lfm2MLP):
    """The MLP with a SiLU that is exact in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden size] to the same."""
        if not is_exact(self):
            return super().forward(x)
        return self.w2(silu(self.w1(x)) * self.w3(x))


class _ExactShortConv(Lfm2ShortConv):
    """The block with a convolution that is exact in eval mode."""

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[batch, tokens, hidden size] to the same."""
        if not is_exact(self):
            return super().forward(hidden_states, past_key_values, attention_mask, **kwargs)
        made = self.in_proj(apply_mask_to_padding_states(hidden_states, attention_mask))
        before, behind, x = made.transpose(1, 2).chunk(3, dim=1)
        x = before * x
        if past_key_values is not None:
            x = past_key_values.update_conv_state(
                x, self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
        mixed = short_convolution(x, self.conv.weight[:, 0])[..., -made.shape[1] :]
        return self.out_proj((behind * mixed).transpose(1, 2))


def _exact_mlp(module: nn.Module) -> nn.Module:
    return _become(_ExactMLP, module)


def _exact_convolution(module: nn.Module) -> nn.Module:
    return _become(_ExactShortConv, module)


def _become(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same module, hooks and all, of another class."""
    made = kind.__new__(kind)
    made.__dict__ = module.__dict__
    return made


def _graph(config: Any) -> GgufGraph:
    taps = [0 if kind == _ATTENTION else config.conv_L_cache for kind in config.layer_types]
    return GgufGraph(
        pairs="halves",
        rope=dict(config.rope_parameters),
        convolutions=taps if any(taps) else None,
    )


def _fields(file: GgufFile, name: str) -> dict[str, Any]:
    key = f"{name}.attention.head_count_kv"
    by_layer, layers = file.need(key, list), layers_of(file, name)
    heads = {count for count in by_layer if count}
    if len(by_layer) != layers or len(heads) != 1:
        raise CheckpointError(
            f"{file.path}: key {key} is {by_layer}, expected the same number for all of {layers} layers that "
            "attend and 0 for the others"
        )
    return {
        "hidden_size": size(file, f"{name}.embedding_length"),
        "intermediate_size": size(file, f"{name}.feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": layers,
        "num_attention_heads": size(file, f"{name}.attention.head_count"),
        "num_key_value_heads": heads.pop(),
        "max_position_embeddings": size(file, f"{name}.context_length"),
        "norm_eps": file.need(f"{name}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": rope_of(file, name),
        "conv_L_cache": size(file, f"{name}.shortconv.l_cache"),
        "layer_types": [_ATTENTION if count else _CONVOLUTION for count in by_layer],
    }


_MLP = {"mlp_in": "feed_forward", "mlp_mid": "feed_forward.w2"}
_MLP_READERS = {"mlp_in": ("feed_forward.w1", "feed_forward.w3"), "mlp_mid": ("feed_forward.w2",)}
_MAKERS = {"attn_in": "operator_norm", "mlp_in": "ffn_norm", "mlp_mid": "feed_forward.w3"}
_EXACT = {
    "operator_norm": ExactRMSNorm,
    "ffn_norm": ExactRMSNorm,
    "feed_forward": _exact_mlp,
}
_NAMES = {
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}

LFM2 = replace(
    LLAMA,
    inputs={"attn_in": "self_attn", "attn_out": "self_attn.out_proj", **_MLP},
    readers={
        "attn_in": LLAMA.readers["attn_in"],
        "attn_out": ("self_attn.out_proj",),
        **_MLP_READERS,
    },
    exact={
        "self_attn.q_layernorm": ExactRMSNorm,
        "self_attn.k_layernorm": ExactRMSNorm,
        **_EXACT,
    },
    norm="model.embedding_norm",
    model_exact={"model.embedding_norm": ExactRMSNorm, "model.rotary_emb": ExactRotary},
    gguf="lfm2",
    layer_names={
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        **_NAMES,
    },
    model_names={
        "model.embed_tokens": "token_embd",
        "model.embedding_norm": "token_embd_norm",
        "lm_head": "output",
    },
    graph=_graph,
    fields=_fields,
    only={"conv_bias": (False,)},
    epsilon="norm_eps",
    keys=lambda config: {"shortconv.l_cache": config.conv_L_cache},
    makers=_MAKERS,
)

LFM2 = replace(
    LFM2,
    convolution=replace(
        LFM2,
        attention="conv",
        inputs={"attn_in": "conv.in_proj", "attn_out": "conv.out_proj", **_MLP},
        readers={"attn_in": ("conv.in_proj",), "attn_out": ("conv.out_proj",), **_MLP_READERS},
        exact={"conv": _exact_convolution, **_EXACT},
        layer_names={
            "conv.in_proj": "shortconv.in_proj",
            "conv.out_proj": "shortconv.out_proj",
            "conv.conv": "shortconv.conv",
            **_NAMES,
        },
    ),
)
