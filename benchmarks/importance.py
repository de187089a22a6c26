"""Token importance: what it is about, and what it earns.

    python benchmarks/importance.py MODEL TEXT                         # calibrated only (PTQ)
    python benchmarks/importance.py MODEL TEXT --steps 150 --seeds 3   # after training
    python benchmarks/importance.py MODEL TEXT --quantized FOLDER      # what `squat quantize` made of MODEL

A model is quantized (W4, "4:8" at the given ratio) by every row of `IMPORTANCE` in turn, trained for some
steps if so asked (pure KL to the model itself), and reads windows of the text that it was not trained on.
Of one that is quantized already only the choice of tokens changes, with thresholds set anew for each.
Printed are

* by position, rank by position: how much of the variance of the importance, and of its rank within the
  window, is explained by the token's position alone (eta squared: the variance of the positions' means over
  all variance), averaged over layers;
* 8 bits: the share of tokens that really got 8 bits;
* KL: nats per token from the full-precision model;
* against scattered: its difference to the control that gives 8 bits to tokens at arbitrary places, with the
  standard error of that difference over windows (paired, seeds averaged) and over seeds.

The last rows give all tokens the same bits: the bounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from squat.checkpoints import load_model, load_tokenizer
from squat.data import tokenize_corpus
from squat.data.packed import sample
from squat.distill import LossConfig, SquatTrainer
from squat.distill.losses import distillation
from squat.quantization import SquatConfig, quantize
from squat.quantization.attention import AttentionSites
from squat.quantization.tokens import IMPORTANCE, POLICIES, ThresholdPolicy, follow_importance

CONTROL = "scattered"
CALIBRATION = 32
"""Windows that steps and thresholds are calibrated on; others are trained on, and others read."""
BATCH = 8


@dataclass
class Reading:
    """What a model made of the windows: KL by window, importance by layer, the share of 8 bits."""

    kl: np.ndarray
    importance: list[Tensor]
    wide: float


def explained_by_position(values: Tensor) -> float:
    """Eta squared of the columns of [windows, positions]."""
    values = values.double()
    return (values.mean(dim=0).var(correction=0) / values.var(correction=0)).item()


@torch.no_grad()
def read(model: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> Reading:
    """KL of every window of [windows, tokens], and what the layers' policies were asked and answered."""
    asked: dict[int, list[Tensor]] = defaultdict(list)
    decided: list[float] = []

    def note(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], wide: Tensor) -> None:
            asked[layer].append(args[0])
            decided.append(wide.float().mean().item())

        return hook

    policies = [m for m in model.modules() if isinstance(m, tuple(POLICIES.values()))]
    hooks = [policy.register_forward_hook(note(i)) for i, policy in enumerate(policies)]
    kl = []
    counted = torch.ones(windows.shape[1], dtype=torch.bool)
    model.eval()
    for batch in windows.split(BATCH):
        logits = zip(model(batch).logits, teacher(batch).logits, strict=True)
        kl += [distillation(student, float_, 1.0, counted).item() for student, float_ in logits]
    for hook in hooks:
        hook.remove()
    importance = [torch.cat(parts) for parts in asked.values()]
    return Reading(np.array(kl), importance, float(np.mean(decided or [np.nan])))


def train(model: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, rate: float) -> None:
    """Steps of pure KL, one for every batch of the windows."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=len(windows) // BATCH // 10,
            weight_decay=0.1,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        loss = LossConfig(gamma=1, temperature=1, entropy=0, distribution=0)
        dataset: Any = [sample(window) for window in windows.numpy()]
        SquatTrainer(model, [teacher], args, dataset, loss).train()


@torch.no_grad()
def choose(model: PreTrainedModel, importance: str, windows: Tensor) -> None:
    """Let a 4:8 model give 8 bits by another importance; thresholds are set on the windows."""
    for module in model.modules():
        if isinstance(module, AttentionSites):
            module.importance = importance
            if isinstance(module.policy, ThresholdPolicy):
                module.policy.threshold.fill_(torch.nan)
                module.policy.train()
    for batch in windows.split(BATCH):
        model(batch)
        follow_importance(model)
    model.eval()


@torch.no_grad()
def give_all(model: PreTrainedModel, bits: int) -> None:
    """Let every token of a 4:8 model have 8 or 4 bits."""
    for module in model.modules():
        if isinstance(module, ThresholdPolicy):
            module.threshold.fill_(-torch.inf if bits == 8 else torch.inf)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a full-precision model's folder")
    parser.add_argument("text", help="a file or folder of text")
    parser.add_argument("--quantized", help="the folder of a 4:8 model of it, by rarity")
    parser.add_argument("--by-source", action="store_true", help="clean BabyLM's files by source")
    parser.add_argument("--windows", type=int, default=128, help="windows to read")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=0, help=f"training steps of {BATCH} windows")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1, help="orders of the training windows")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of tokens with 8 bits")
    parser.add_argument("--policy", choices=POLICIES, default="threshold")
    parser.add_argument("--importance", nargs="*", choices=IMPORTANCE, default=list(IMPORTANCE))
    args = parser.parse_args()

    tokenizer, teacher = load_tokenizer(args.model), load_model(args.model)
    tokens = np.asarray(tokenize_corpus(args.text, tokenizer, by_source=args.by_source), np.int64)
    rows = torch.from_numpy(tokens[: len(tokens) // args.length * args.length])
    rows = rows.view(-1, args.length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    calibration, windows, rest = rows.split(
        [CALIBRATION, args.windows, len(rows) - CALIBRATION - args.windows]
    )

    quantized = load_model(args.quantized) if args.quantized else None

    def measure(seed: int, **config: Any) -> Reading:
        if quantized is not None:
            if "importance" in config:
                choose(quantized, config["importance"], calibration)
            else:
                give_all(quantized, config["activation_bits"])
            return read(quantized, teacher, windows)
        model = quantize(load_model(args.model), SquatConfig(**config), [calibration])
        if args.steps:
            order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
            train(model, teacher, rest[order[: args.steps * BATCH]], args.learning_rate)
        return read(model, teacher, windows)

    configs: dict[str, dict[str, Any]] = {
        name: {"importance": name, "ratio": args.ratio, "policy": args.policy}
        for name in dict.fromkeys([CONTROL, *args.importance])
    }
    configs |= {f"all {bits} bits": {"activation_bits": bits} for bits in (8, 4)}
    readings: dict[str, list[Reading]] = {name: [] for name in configs}
    jobs = [(seed, name) for seed in range(args.seeds) for name in configs]
    for seed, name in track(jobs, "Measuring", console=Console(stderr=True)):
        readings[name].append(measure(seed, **configs[name]))
    Console(width=120).print(table(readings, f"{Path(args.model).name}, {vars(args)}"))


def table(readings: dict[str, list[Reading]], title: str) -> Table:
    """One row for each importance."""
    out = Table("importance", title=title)
    for heading in ("by position", "rank by position", "8 bits", "KL", "against scattered"):
        out.add_column(heading, justify="right")
    for name, seeds in readings.items():
        first = seeds[0]
        kl = np.stack([reading.kl for reading in seeds])
        difference = kl - np.stack([reading.kl for reading in readings[CONTROL]])
        error = difference.mean(axis=0).std(ddof=1) / difference.shape[1] ** 0.5
        against = f"{difference.mean():+.4f} ± {error:.4f}"
        if len(seeds) > 1:
            over_seeds = difference.mean(axis=1).std(ddof=1) / len(seeds) ** 0.5
            against += f" ± {over_seeds:.4f}"
        ranks = [layer.argsort(dim=1).argsort(dim=1) for layer in first.importance]
        by_position = [
            f"{np.mean([explained_by_position(layer) for layer in layers]):.3f}" if layers else ""
            for layers in (first.importance, ranks)
        ]
        wide = f"{np.mean([reading.wide for reading in seeds]):.2f}" if first.importance else ""
        out.add_row(name, *by_position, wide, f"{kl.mean():.4f}", against)
    return out


if __name__ == "__main__":
    main()
