"""Is there a layer that a Hadamard transform harms? Error with a site's transform, and without it.

    python benchmarks/transforms.py MODEL --data FILE [--bits 4 8]

The model is quantized as by default (weights in 4 bits, rounded to the nearest), and once more for every site
of a layer with that site's transform left out; calibrated on 8 windows of 256 tokens. Each quantized layer is
given what the float model has in front of it, on 8 other windows. Its error is that of its output, a token's
squared error over its squared length. Printed are, by site, the layers of all whose error is smaller with the
transform, and the error without it over that with it: the median layer's, and the least.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.architectures import architecture_of
from squat.checkpoints import load_model, load_tokenizer
from squat.exact import approximately
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import HADAMARD_SITES
from squat.quantization.walk import Walk
from squat.runs import text_windows

WINDOWS, AT_ONCE = 8, 2
SITES = [site for site in HADAMARD_SITES if site != "head_in"]


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """A model's decoder layers."""
    row = architecture_of(model.config.model_type)
    return list(model.get_submodule(row.layers).children())


@torch.no_grad()
def errors(original: PreTrainedModel, model: PreTrainedModel, windows: Tensor) -> list[float]:
    """By layer, the relative squared error of a quantized layer that is given the original's input."""
    batches = windows.split(AT_ONCE)
    reference = Walk(original, layers_of(original), batches)
    stream = Walk(model, layers_of(model), batches)
    found = []
    for index, (layer, twin) in enumerate(zip(layers_of(model), layers_of(original), strict=True)):
        targets = reference.outputs(twin, index)
        stream.hidden = reference.hidden
        pairs = zip(stream.outputs(layer, index), targets, strict=True)
        relative = [(o - t).square().sum(-1) / t.square().sum(-1) for o, t in pairs]
        found.append(float(torch.cat(relative).mean()))
        reference.hidden = targets
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a float model: a folder, a name on the Hub, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="a text")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="of activations")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    original = load_model(args.model).eval()
    windows = text_windows(original, tokenizer, args.data, True, 2 * WINDOWS)
    seen, others = windows[:WINDOWS], windows[-WINDOWS:]
    table = Table("bits", "site", "layers better with it", "error without it, median", "least")
    with Progress(console=Console(stderr=True)) as progress, approximately():

        def measured(bits: int, left_out: str | None) -> list[float]:
            sites = [site for site in HADAMARD_SITES if site != left_out]
            config = SquatConfig(activation_bits=bits, hadamard=sites)
            model = quantize(load_model(args.model), config, seen.split(AT_ONCE)).eval()
            return errors(original, model, others)

        for bits in args.bits:
            with_all = measured(bits, None)
            for site in progress.track(SITES, description=f"activations of {bits} bits"):
                without = measured(bits, site)
                ratios = [a / b for a, b in zip(without, with_all, strict=True)]
                better = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
                table.add_row(
                    str(bits), site, better, f"{median(ratios):.2f}", f"{min(ratios):.2f}"
                )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
