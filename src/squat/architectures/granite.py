"""Granite, dense: a Llama with four multipliers, of embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from squat.architectures.llama import LLAMA, graph
from squat.deploy.gguf import GgufGraph


def _graph(config: Any) -> GgufGraph:
    return replace(
        graph(config),
        embedding_scale=config.embedding_multiplier,
        attention_scale=config.attention_multiplier,
        residual_scale=config.residual_multiplier,
        logit_divisor=config.logits_scaling,
    )


def _keys(config: Any) -> dict[str, float | int]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "attention.scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


GRANITE = replace(LLAMA, gguf="granite", graph=_graph, keys=_keys)
