"""Qwen3: a Llama that normalizes each head's queries and keys, with heads of a size of their own."""

from __future__ import annotations

from dataclasses import replace

from squat.architectures.llama import LLAMA, halves
from squat.exact import ExactRMSNorm

QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
"""The norms of queries and keys, and what a file calls them."""


QWEN3 = replace(
    LLAMA,
    exact=LLAMA.exact | dict.fromkeys(QK_NORMS, ExactRMSNorm),
    gguf="qwen3",
    layer_names=LLAMA.layer_names | QK_NORMS,
    graph=halves,
)
