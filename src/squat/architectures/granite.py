"""Granite, dense: a Llama with four multipliers, of embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from squat.architectures.fields import decoder_fields
from squat.architectures.llama import LLAMA, graph
from squat.deploy.gguf import GgufGraph

if TYPE_CHECKING:
    from squat.importing.file import GgufFile


_KEYS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
"""llama.cpp's keys, and the config's fields."""


def _graph(config: Any) -> GgufGraph:
    return replace(
        graph(config),
        embedding_scale=config.embedding_multiplier,
        attention_scale=config.attention_multiplier,
        residual_scale=config.residual_multiplier,
        logit_divisor=config.logits_scaling,
    )


def _keys(config: Any) -> dict[str, float | int]:
    return {key: float(getattr(config, field)) for key, field in _KEYS.items()}


def _fields(file: GgufFile, name: str) -> dict[str, Any]:
    scales = {field: file.need(f"{name}.{key}", float) for key, field in _KEYS.items()}
    return decoder_fields(file, name) | scales


GRANITE = replace(LLAMA, gguf="granite", graph=_graph, fields=_fields, keys=_keys)
