"""What steps that follow the token leave of it, site by site (docs/design.md).

    python benchmarks/token_steps.py MODEL --data FILE

Of every site of a float model, behind its transform, some hundred tokens are quantized: at 8 bits, at 4 bits in
equal steps, and at 4 bits with 16 levels; with token exponents and margins of 0, 1 and 2 powers of two of
clipping, and with peaks; each with the base step that calibration would find. Printed is a token's squared
error over its own squared length, mean over tokens and layers, and in brackets all squared errors over all
squared lengths, where the few large tokens count.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from squat.checkpoints import load_model, load_tokenizer
from squat.exact import approximately
from squat.quantization import SquatConfig
from squat.quantization.activation_steps import fit_step_and_levels, token_mse_step
from squat.quantization.config import SITES
from squat.quantization.convert import convert, fold_transforms
from squat.quantization.levels import HIGHEST, LOWEST, snap_to
from squat.quantization.modules import SiteQuantizer
from squat.quantization.numerics import (
    fake_quantize,
    peak_multiplier,
    power_of_two,
    token_exponent,
)

WINDOWS, LENGTH, TOKENS = 4, 256, 512
RULES: dict[str, int | None] = {"0": 0, "1": 1, "2": 2, "peak": None}
"""Margins of exponents, and peaks, which have none."""
KINDS = ("8 bits", "4 bits", "4 bits, levels")


@torch.no_grad()
def samples_of(model: str, data: Path) -> dict[str, list[Tensor]]:
    """By site, the vectors of every layer: [tokens, n] each."""
    network, tokenizer = load_model(model), load_tokenizer(model)
    config = SquatConfig(weight_bits=32, activation_bits=8)
    convert(network, config)
    fold_transforms(network, config)
    for module in network.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.bypassed = True
    sites = [module for module in network.modules() if isinstance(module, SiteQuantizer)]
    for site in sites:
        site.start_collecting()
    ids = tokenizer(data.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    if tokenizer.bos_token_id is not None:
        windows[:, 0] = tokenizer.bos_token_id
    with approximately():
        network(input_ids=windows, use_cache=False)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for site in sites:
        if SITES[site.site].signed:
            found[site.site].append(torch.cat(site.sample["8"])[:TOKENS])
    return found


def errors_of(vectors: Tensor, kind: str, margin: int | None) -> Tensor:
    """The mean relative squared error of tokens, and that of all together: [2]."""
    multipliers = peak_multiplier(vectors) if margin is None else torch.ones(len(vectors), 1)
    original, vectors = vectors, vectors / multipliers
    low, high, snap = LOWEST, HIGHEST, None
    if kind == "4 bits, levels":
        step, levels = fit_step_and_levels(vectors, margin)
        snap = snap_to(levels)
    else:
        low, high = (LOWEST, HIGHEST) if kind == "8 bits" else (-8, 7)
        step = token_mse_step(vectors, low, high, margin)
    if margin is not None:
        multipliers = power_of_two(token_exponent(original, step * float(high << margin)))
    quantized = fake_quantize(original, step * multipliers, low, high, snap)
    squares = (quantized - original).square().sum(1)
    lengths = original.square().sum(1).clamp_min(1e-30)
    return torch.stack([(squares / lengths).mean(), squares.sum() / lengths.sum()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a float model: a folder, a name on the Hub, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="a text")
    arguments = parser.parse_args()
    table = Table(title="Relative squared error, in thousandths")
    table.add_column("site")
    for kind in KINDS:
        for rule in RULES:
            table.add_column(f"{kind}, {rule}", justify="right")
    console = Console(width=160)
    samples = samples_of(arguments.model, arguments.data)
    for site, layers in track(samples.items(), "sites", console=Console(stderr=True)):
        cells = []
        for kind in KINDS:
            for margin in RULES.values():
                mean = torch.stack([errors_of(x, kind, margin) for x in layers]).mean(0) * 1e3
                cells.append(f"{mean[0]:.3g} ({mean[1]:.3g})")
        table.add_row(site, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
