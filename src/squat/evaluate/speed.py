"""Tokens per second of any model on one prompt, roughly. `squat bench` measures the engine with care."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from squat.engine import Engine

ROUNDS = 5


def tokens_per_second(model: PreTrainedModel | Engine, ids: Sequence[int]) -> tuple[float, float]:
    """Prefill of the first half of `ids` and decoding of the second: medians of five rounds."""
    half = len(ids) // 2
    time = _time_engine if isinstance(model, Engine) else _time_pytorch
    rounds = [time(model, list(ids), half) for _ in range(ROUNDS + 1)][1:]  # the first warms up
    prefill, decode = np.median(rounds, axis=0)
    return half / prefill, (len(ids) - half) / decode


@torch.no_grad()
def _time_pytorch(model: Any, ids: list[int], half: int) -> tuple[float, float]:
    """Seconds for prefill and for decoding."""
    start = perf_counter()
    cache = model(torch.tensor([ids[:half]]), use_cache=True, logits_to_keep=1).past_key_values
    middle = perf_counter()
    for token in ids[half:]:
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return middle - start, perf_counter() - middle


def _time_engine(engine: Any, ids: list[int], half: int) -> tuple[float, float]:
    start = perf_counter()
    engine.prefill(ids[:half])
    middle = perf_counter()
    for token in ids[half:]:
        engine.decode(token)
    return middle - start, perf_counter() - middle
