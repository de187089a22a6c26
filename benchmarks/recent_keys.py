"""How many keys should be seen in 8 bits: the distance from the original by `recent_keys`.

    python benchmarks/recent_keys.py ORIGINAL QUANTIZED --data TEXT [--recent 0 1 4 16 64] [--length 256]

QUANTIZED is a checkpoint of `squat quantize` whose keys have 4 bits, and `recent_keys` more than 0. Nothing
is calibrated again: the same steps and codes, only more or fewer keys in 8 bits. On 2,048 tokens
that calibration has not seen: KL(original || quantized), nats a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from squat.checkpoints import load_model, load_tokenizer
from squat.quantization.modules import SiteQuantizer
from squat.runs import distance, text_windows
from squat.terminal import progress, show

SEEN, HELD_OUT = 256, 8
"""Windows of a text: those that calibration may have seen, then those that count."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("quantized")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recent", type=int, nargs="+", default=[0, 1, 4, 16, 64])
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    original, model = load_model(arguments.original), load_model(arguments.quantized)
    tokenizer = load_tokenizer(arguments.original)
    text = text_windows(original, tokenizer, arguments.data, True, SEEN + HELD_OUT)[SEEN:]
    windows = text.view(-1, arguments.length)
    keys = [m for m in model.modules() if isinstance(m, SiteQuantizer) and m.recent]
    table = Table("keys seen in 8 bits", "KL", "same top token")
    with progress("recent keys") as tell:
        for done, recent in enumerate(arguments.recent):
            for site in keys:
                site.recent = recent
            found = distance(original, model, windows.split(1))
            table.add_row(str(recent), f"{found.kl:.4f}", f"{100 * found.same:.1f} %")
            tell(done + 1, len(arguments.recent))
    show(table)


if __name__ == "__main__":
    main()
