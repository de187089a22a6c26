"""How many keys should be seen in 8 bits: the distance from the original by `recent_keys`.

    python benchmarks/recent_keys.py ORIGINAL QUANTIZED --data TEXT [--recent 0 1 4 16 64] [--length 256]

QUANTIZED is a checkpoint of `squat quantize` whose keys have 4 bits, and `recent_keys` more than 0. Nothing is calibrated
again: the same steps and codes, only that more or fewer keys are seen in 8 bits. 2,048 tokens of the text, and KL(original ||
quantized), nats a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from squat.checkpoints import load_model, load_tokenizer
from squat.data.corpus import tokenize_corpus
from squat.quantization.modules import SiteQuantizer
from squat.runs import distance
from squat.terminal import progress, show

TOKENS = 2048


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
    tokens = tokenize_corpus(arguments.data, load_tokenizer(arguments.original))
    # The end of the text: calibration takes its windows all over it, and few of so many tokens.
    windows = tokens[-TOKENS:].view(-1, arguments.length).clone()
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
