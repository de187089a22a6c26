"""What token importance is about, and what it earns without any training.

    python benchmarks/importance.py $SQUAT_DATA/../models/babylm-6m $SQUAT_DATA/babylm/dev

A model is quantized (PTQ, W4, calibrated steps) with every row of `IMPORTANCE` in turn, "4:8" at the given
ratio, and reads windows of the text. Printed are, as means over layers,

* how much of the variance of the importance, and of its rank within the window, is explained by the
  token's position alone (eta squared: the variance of the means of the positions over all variance);
* the share of tokens that really got 8 bits;

and the loss above the unquantized model, with its difference to the control `scattered` (8 bits for tokens
at arbitrary places) and that difference's standard error over windows. All tokens at 8 and at 4 bits
stand below, as bounds.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from squat.checkpoints import load_model, load_tokenizer
from squat.data import tokenize_corpus
from squat.evaluate.huggingface import log_probabilities
from squat.quantize import SquatConfig, quantize
from squat.quantize.tokens import IMPORTANCE, POLICIES

CALIBRATION = 32
"""Windows that steps and thresholds are calibrated on; the others are read."""


@dataclass
class Reading:
    """What a model made of the windows: nats per window and token, and every layer's importance."""

    loss: np.ndarray
    importance: list[Tensor]
    wide: float


def explained_by_position(values: Tensor) -> float:
    """Eta squared of the columns of [windows, positions]."""
    values = values.double()
    return (values.mean(dim=0).var(correction=0) / values.var(correction=0)).item()


def read(model: PreTrainedModel, windows: Tensor) -> Reading:
    """Loss of every window [windows, tokens], and what its layers' policies were asked."""
    asked: dict[int, list[Tensor]] = defaultdict(list)
    decided: list[Tensor] = []
    policies = [m for m in model.modules() if isinstance(m, tuple(POLICIES.values()))]

    def note(layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], wide: Tensor) -> None:
            asked[layer].append(args[0].detach())
            decided.append(wide.float().mean())

        return hook

    hooks = [policy.register_forward_hook(note(i)) for i, policy in enumerate(policies)]
    total = log_probabilities(model, list(windows.numpy()), 16, "Reading")
    for hook in hooks:
        hook.remove()
    loss = -np.array(total) / (windows.shape[1] - 1)
    importance = [torch.cat(parts) for parts in asked.values()]
    return Reading(loss, importance, torch.stack(decided).mean().item() if decided else math.nan)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a full-precision model's folder")
    parser.add_argument("text", help="a file or folder of text")
    parser.add_argument("--by-source", action="store_true", help="clean BabyLM's files by source")
    parser.add_argument("--windows", type=int, default=128, help="windows to read")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of tokens with 8 bits")
    parser.add_argument("--policy", choices=POLICIES, default="threshold")
    parser.add_argument("--importance", nargs="*", choices=IMPORTANCE, default=list(IMPORTANCE))
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    tokens = torch.from_numpy(
        np.asarray(tokenize_corpus(Path(args.text), tokenizer, by_source=args.by_source), np.int64)
    )
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    calibration, windows = rows[chosen[:CALIBRATION]], rows[chosen[CALIBRATION:][: args.windows]]

    def quantized(**config: Any) -> Reading:
        model = quantize(load_model(args.model), SquatConfig(**config), [calibration])
        return read(model, windows)

    float_loss = read(load_model(args.model), windows).loss
    readings = {
        name: quantized(importance=name, ratio=args.ratio, policy=args.policy)
        for name in dict.fromkeys([*args.importance, "scattered"])
    }
    table = Table(
        title=f"{Path(args.model).name}, {args.policy}, ratio {args.ratio}, {windows.numel()} tokens"
    )
    table.add_column("importance")
    for heading in ("by position", "rank by position", "8 bits", "loss", "against scattered"):
        table.add_column(heading, justify="right")
    control = readings["scattered"].loss
    for name, reading in readings.items():
        ranks = [layer.argsort(dim=1).argsort(dim=1) for layer in reading.importance]
        difference = reading.loss - control
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        table.add_row(
            name,
            f"{np.mean([explained_by_position(layer) for layer in reading.importance]):.3f}",
            f"{np.mean([explained_by_position(rank) for rank in ranks]):.3f}",
            f"{reading.wide:.3f}",
            f"{(reading.loss - float_loss).mean():+.4f}",
            f"{difference.mean():+.4f} ± {error:.4f}",
        )
    for bits in (8, 4):
        loss = quantized(activation_bits=bits).loss
        table.add_row(f"all {bits} bits", "", "", "", f"{(loss - float_loss).mean():+.4f}", "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
