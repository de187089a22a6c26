"""What quantized activations alone cost a model, and what is done about it.

    python benchmarks/activations.py MODEL --data FILE [--bits 4 8] [--sites]
    python benchmarks/activations.py MODEL --data FILE --shape

Weights stay in float. Calibrated on 8 windows of 256 tokens of the text, measured on its last 8: KL to the
original, nats a token. `--sites` switches on one site at a time as well. `--shape` prints what reflections
and key centers are about instead, behind channel scales: by site, the least and the most of all layers, each
token counting alike, how much of the energy is in the mean (of each head, in attention), and how loud the
loudest block of a Hadamard matrix is over the quietest (root mean square).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.checkpoints import load_model, load_tokenizer
from squat.evaluate.sensitivity import only
from squat.exact import approximately
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import FLOAT, SITES
from squat.quantization.hadamard import power_of_two_in
from squat.quantization.modules import SiteQuantizer
from squat.runs import text_windows

WINDOWS, AT_ONCE = 8, 2
OFF: dict[str, object] = {
    "channel_scales": False,
    "reflections": False,
    "key_centers": False,
    "wide_first_token": False,
}
VARIANTS: dict[str, dict[str, object]] = {
    "static": {**OFF, "token_steps": "static"},
    "exponent": {**OFF, "token_steps": "exponent"},
    "peak": OFF,
    "exponent, channel scales": {**OFF, "token_steps": "exponent", "channel_scales": True},
    "peak, channel scales": {**OFF, "channel_scales": True},
    "peak, channel scales, reflections": {"key_centers": False, "wide_first_token": False},
    "peak, channel scales, key centers": {"reflections": False, "wide_first_token": False},
    "all but a wide first token": {"wide_first_token": False},
    "all": {},
}
FIRST_TOKEN = "all, first token float"


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


def spare_first_token(site: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of a site: what the first token of each window has there is not quantized."""
    assert isinstance(site, SiteQuantizer)
    first = site.transformed(args[0][..., :1, :]).to(output.dtype)
    return torch.cat((first, output[..., 1:, :]), dim=-2)


def shape(model: PreTrainedModel, windows: Tensor) -> Table:
    """What vectors are like at the sites of a quantized model."""
    found: dict[str, list[tuple[float, float]]] = {}

    def look(site: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(site, SiteQuantizer)
        heads = site.site in (
            "q",
            "k",
            "v",
        )  # [batch, heads, tokens, elements], else [batch, tokens, elements]
        x = output.transpose(0, 1).flatten(1, 2) if heads else output.flatten(0, 1)[None]
        x = x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
        mean = x.mean(dim=1).square().sum(dim=-1).mean()
        width = x.shape[-1] if heads else power_of_two_in(x.shape[-1])
        loudness = x.unflatten(-1, (-1, width)).square().mean(dim=(0, 1, 3)).sqrt()
        found.setdefault(site.site, []).append(
            (mean.item(), (loudness.max() / loudness.min()).item())
        )

    for module in model.modules():
        if isinstance(module, SiteQuantizer) and module.site != "probs":
            module.start_collecting(keep=False)
            module.register_forward_hook(look)
    with torch.no_grad(), approximately():
        model(input_ids=windows, use_cache=False, logits_to_keep=1)
    table = Table("site", "energy in the mean", "loudest over quietest block")
    for site, values in found.items():
        means, loudness = zip(*values, strict=True)
        table.add_row(
            site,
            f"{min(means):.0%} to {max(means):.0%}",
            f"{min(loudness):.1f} to {max(loudness):.1f}",
        )
    return table


def main() -> None:
    names = [*VARIANTS, FIRST_TOKEN]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a float model: a folder, a name on the Hub, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="a text")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="of activations")
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--sites", action="store_true", help="one site at a time, too")
    parser.add_argument("--shape", action="store_true", help="what vectors are like, instead")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    original = load_model(args.model)
    windows = text_windows(original, tokenizer, args.data, True, 2 * WINDOWS)
    seen, others = windows[:WINDOWS], windows[-WINDOWS:]
    if args.shape:
        balanced = VARIANTS["peak, channel scales"]
        config = SquatConfig(weight_bits=FLOAT, embedding_bits=FLOAT, activation_bits=4, **balanced)
        model = quantize(original, config, seen.split(AT_ONCE)).eval()
        Console(width=160).print(shape(model, seen))
        return
    expected = log_probabilities(original, others)
    table = Table("activations", "bits", "KL", *(SITES if args.sites else ()))
    console = Console(width=160)
    with Progress(console=Console(stderr=True)) as progress:
        for name in progress.track(args.variants):
            settings = VARIANTS.get(name, {})
            for bits in args.bits:
                config = SquatConfig(
                    weight_bits=FLOAT, embedding_bits=FLOAT, activation_bits=bits, **settings
                )
                model = quantize(load_model(args.model), config, seen.split(AT_ONCE)).eval()
                if name == FIRST_TOKEN:
                    for module in model.modules():
                        if isinstance(module, SiteQuantizer):
                            module.register_forward_hook(spare_first_token)
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
