"""How much of what its inputs have lost a matrix should make up for, and how hard it is held meanwhile.

    python benchmarks/descent.py ORIGINAL --data TEXT --shares 0.25 0.5 1 [--activation-bits 4] [--windows 64]
        [--weight-levels uniform] [--token-steps exponent] [--dampings 0.01]

Every share is calibrated on the same windows of 256 tokens (5 to 10 minutes each for 135M parameters, on one
core) and compared with the original on some of these and on 16 others: KL(original || quantized), nats.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from rich.table import Table

from squat.checkpoints import load_model, load_tokenizer
from squat.quantization import SquatConfig, descent, quantize
from squat.runs import BATCH, distance, text_windows
from squat.terminal import progress, show

HELD_OUT = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", required=True)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--weight-levels", default="iq4_nl")
    parser.add_argument(
        "--token-steps", default="peak", help="exponent also leaves channels as they are"
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=descent.DAMPINGS)
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    original = load_model(arguments.original)
    tokenizer = load_tokenizer(arguments.original)
    count = arguments.windows + HELD_OUT
    windows = text_windows(original, tokenizer, arguments.data, True, count)
    seen, others = windows[: arguments.windows], windows[arguments.windows :]
    table = Table("share", "KL, seen", "KL, held out")
    descent.DAMPINGS = tuple(arguments.dampings)
    for share in arguments.shares:
        descent._MADE_UP_FOR = share
        model = copy.deepcopy(original)
        config = SquatConfig(
            activation_bits=arguments.activation_bits,
            weight_levels=arguments.weight_levels,
            token_steps=arguments.token_steps,
            channel_scales=arguments.token_steps != "exponent",
        )
        with progress(f"share {share}") as tell:
            quantize(model, config, seen.split(BATCH), "descent", tell)
        found = [distance(original, model, part.split(BATCH)) for part in (seen[:HELD_OUT], others)]
        table.add_row(f"{share}", *(f"{of.kl:.4f}" for of in found))
    show(table)


if __name__ == "__main__":
    main()
