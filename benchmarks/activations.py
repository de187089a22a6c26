"""What quantized activations alone cost a model, and what token steps and channel scales bring.

    python benchmarks/activations.py MODEL --data FILE [--bits 4 8] [--sites]

Weights stay in float. Calibrated on 8 windows of 256 tokens of the text, measured on its last 8: KL to the
original, nats a token. `--sites` switches on one site at a time as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from squat.checkpoints import load_model, load_tokenizer
from squat.evaluate.sensitivity import only
from squat.exact import approximately
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import FLOAT, SITES
from squat.quantization.modules import SiteQuantizer
from squat.runs import text_windows

WINDOWS, AT_ONCE = 8, 2
VARIANTS: dict[str, dict[str, object]] = {
    "static": {"token_steps": "static", "channel_scales": False},
    "exponent": {"token_steps": "exponent", "channel_scales": False},
    "peak": {"token_steps": "peak", "channel_scales": False},
    "exponent, channel scales": {"token_steps": "exponent"},
    "peak, channel scales": {"token_steps": "peak"},
}


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Of every position: [tokens, vocabulary] for each few windows."""
    with approximately():
        return [
            model(input_ids=part, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
            for part in windows.split(AT_ONCE)
        ]


def divergence(expected: list[Tensor], model: PreTrainedModel, windows: Tensor) -> float:
    """The mean KL divergence of the model from `expected`."""
    found = log_probabilities(model, windows)
    total = sum(float((e.exp() * (e - f)).sum()) for e, f in zip(expected, found, strict=True))
    return total / windows.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a float model: a folder, a name on the Hub, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="a text")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="of activations")
    parser.add_argument("--sites", action="store_true", help="one site at a time, too")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    original = load_model(args.model)
    windows = text_windows(original, tokenizer, args.data, True, 2 * WINDOWS)
    seen, others = windows[:WINDOWS], windows[-WINDOWS:]
    expected = log_probabilities(original, others)
    table = Table("activations", "bits", "KL", *(SITES if args.sites else ()))
    console = Console(width=160)
    with Progress(console=Console(stderr=True)) as progress:
        for name, settings in progress.track(VARIANTS.items()):
            for bits in args.bits:
                config = SquatConfig(
                    weight_bits=FLOAT, embedding_bits=FLOAT, activation_bits=bits, **settings
                )
                model = quantize(load_model(args.model), config, seen.split(AT_ONCE)).eval()
                cells = [f"{divergence(expected, model, others):.4f}"]
                for site in SITES if args.sites else ():
                    members = {
                        name
                        for name, module in model.named_modules()
                        if isinstance(module, SiteQuantizer) and module.site == site
                    }
                    with only(model, members):
                        cells.append(f"{divergence(expected, model, others):.4f}")
                table.add_row(name, str(bits), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
