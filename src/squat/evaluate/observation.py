"""What attention looks like inside a model: q, k, its maps, and which tokens got 8 bits (paper, Figures 2-3).

Full-precision models are observed through the same attention function as quantized ones, with every
quantizer passing through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from squat.modes import evaluating
from squat.quantization import SquatConfig
from squat.quantization.config import FLOAT, SITES
from squat.quantization.convert import convert
from squat.quantization.numerics import subsample

_SAMPLE = 1 << 15


@dataclass(frozen=True)
class Observation:
    """What was seen in one model.

    query, key: per layer, a sample of the values, as the product takes them. maps: [layers, tokens, tokens],
    attention of the first window, averaged over heads. first_column: [layers, tokens], attention to the
    first token, averaged over heads and windows. widths: bool [layers, tokens of the text], which tokens
    got 8 bits; None for a model whose widths do not depend on the token.
    """

    query: list[NDArray[np.float32]]
    key: list[NDArray[np.float32]]
    maps: NDArray[np.float32]
    first_column: NDArray[np.float32]
    widths: NDArray[np.bool_] | None

    def similarity(self, other: Observation) -> float:
        """Mean cosine similarity of the two models' maps over layers."""
        a, b = (o.maps.reshape(len(o.maps), -1) for o in (self, other))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return float(((a * b).sum(1) / norms).mean())


@torch.no_grad()
def observe(model: PreTrainedModel, windows: Tensor, text: Sequence[int]) -> Observation:
    """Run a model on some windows and on one text, and look.

    Args:
        model: float or quantized; a float one is converted in place.
        windows: token ids [windows, tokens].
        text: token ids of the text whose widths are wanted.

    Raises:
        ConfigError: an architecture without a row in `squat.quantization.convert`.
    """
    if not hasattr(model, "token_state"):
        nothing: Any = dict.fromkeys(SITES, FLOAT)
        convert(
            model,
            SquatConfig(
                weight_bits=FLOAT,
                embedding_bits=FLOAT,
                activation_bits=FLOAT,
                site_bits=nothing,
                hadamard=(),
            ),
        )
    state: Any = model.token_state
    with evaluating(model):
        state.record = True
        model(windows.to(model.device), use_cache=False)
        state.record = False
        taps = [tap for _, tap in sorted(state.taps.items())]
        state.taps.clear()
        model(torch.tensor([list(text)], device=model.device), use_cache=False)
    widths = [wide[0] for layer, wide in sorted(state.wide.items()) if layer >= 0]
    return Observation(
        query=[_sample(tap.query) for tap in taps],
        key=[_sample(tap.key) for tap in taps],
        maps=np.stack([tap.probs[0].mean(0).float().cpu().numpy() for tap in taps]),
        first_column=np.stack(
            [tap.probs[..., 0].mean((0, 1)).float().cpu().numpy() for tap in taps]
        ),
        widths=torch.stack(widths).cpu().numpy() if widths else None,
    )


def _sample(x: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = subsample(x.float().flatten(), _SAMPLE).cpu().numpy()
    return values


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Shannon entropy of a histogram, in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())
