"""Tiny random models for tests, and the real ones where SQUAT_DATA names the folder of real data."""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from squat.quantization import SquatConfig, quantize

TINY = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-untied": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "gpt2": {"n_inner": 48, "tie_word_embeddings": True},
}
"""Name -> what departs from the common shape; the name up to a dash is the model_type."""

ARCHITECTURES = {
    **TINY,
    "llama-gelu": {"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh"},
    "gpt2-gelu": {"n_inner": 48, "activation_function": "gelu"},
    "mistral": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 64},
    "mistral-window": {"num_key_value_heads": 2, "sliding_window": 7},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-window": {
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
    },
    "granite": {
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.3,
        "tie_word_embeddings": True,
    },
    "olmo2": {"num_key_value_heads": 2},
    "lfm2": {
        "num_key_value_heads": 2,
        "intermediate_size": 72,
        "block_multiple_of": 8,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "lfm2-untied": {
        "num_key_value_heads": 1,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": False,
        "conv_L_cache": 5,
        "layer_types": ["full_attention", "conv", "full_attention"],
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox-sequential": {"use_parallel_residual": False, "hidden_act": "gelu_new"},
}
"""The same for every row of `squat.architectures`; TINY are those whose files say nothing of their graph."""


PUBLISHED = {
    "weight_steps": "tensor",
    "token_steps": "static",
    "softmax": "natural",
    "weight_levels": "uniform",
    "activation_levels": "uniform",
    "hadamard": (),
    "reflections": False,
    "channel_scales": False,
    "key_centers": False,
    "wide_first_token": False,
}
"""SquatConfig's fields for what the paper does: one step a tensor, and nothing done to the model before."""


def tiny_model(name="llama", seed=0, **overrides):
    """A random model that is sharp enough for its logits to differ: [vocab 97, 3 layers, 4 heads]."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(
        name.split("-")[0], **{**shape, **ARCHITECTURES[name], **overrides}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def some_ids(batch=2, tokens=24, seed=0, vocab=97):
    """Token ids without the special ones."""
    return torch.randint(3, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


_CALIBRATED: dict[str, PreTrainedModel] = {}


def quantized_model(name="llama", config=None, **overrides):
    """A tiny model, quantized on a little text: calibrated once for each kind, as that takes a second."""
    config = config or SquatConfig()
    kind = json.dumps([name, config.to_dict(), overrides], sort_keys=True)
    if kind not in _CALIBRATED:
        model = tiny_model(name, **overrides)
        _CALIBRATED[kind] = quantize(model, config, calibration=[some_ids(8, 32)]).eval()
    return deepcopy(_CALIBRATED[kind])


def real_data() -> Path:
    """The folder of real data; skips the test where there is none."""
    folder = os.environ.get("SQUAT_DATA")
    if not folder:
        pytest.skip("SQUAT_DATA is not set: no folder of real data here")
    return Path(folder)


def real_model(name: str) -> str:
    """The folder of a really trained model beside the real data."""
    return str(real_data().parent / "models" / name)
