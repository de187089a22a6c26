"""What each idea brings: one after the other on top of the paper's method, and each left out of the default.

    python benchmarks/ideas.py ORIGINAL --data TEXT [--activation-bits 8 4] [--windows 16] [--json FILE]

No training. Each row quantizes the original anew on the same windows of 256 tokens (about a minute for 135M
parameters on one core, with 16 of them) and is compared with it on 16 others: KL(original || quantized), nats
a token. Few windows are enough to compare; `squat quantize` takes 128 and comes nearer to the original.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from squat.checkpoints import load_model, load_tokenizer
from squat.data.files import writing
from squat.quantization import SquatConfig, quantize
from squat.runs import BATCH, distance, text_windows
from squat.terminal import progress, show

HELD_OUT = 16
IDEAS: dict[str, dict[str, Any]] = {
    "steps by row": {"weight_steps": "tensor"},
    "steps by token": {"token_steps": "static"},
    "Hadamard transforms": {"hadamard": [], "reflections": False, "key_centers": False},
    "levels": {"weight_levels": "uniform", "activation_levels": "uniform"},
    "descent": {"weights": "nearest"},
    "channel scales": {"channel_scales": False},
    "reflections": {"reflections": False},
    "key centers": {"key_centers": False},
    "first token wide": {"wide_first_token": False},
    "recent keys in 8 bits": {"recent_keys": 0},
    "softmax in base 2": {"softmax": "natural"},
}
"""In the order in which they are added: what does without each of them."""


def rows() -> dict[str, dict[str, Any]]:
    """The settings of each row."""
    names = list(IDEAS)
    found = {}
    for count in range(len(names) + 1):
        without: dict[str, Any] = {}
        for name in names[count:]:
            without |= IDEAS[name]
        found["the paper's" if count == 0 else f"+ {names[count - 1]}"] = without
    return found | {f"without {name}": dict(IDEAS[name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--activation-bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    original = load_model(arguments.original)
    tokenizer = load_tokenizer(arguments.original)
    count = arguments.windows + HELD_OUT
    windows = text_windows(original, tokenizer, arguments.data, True, count)
    seen, others = windows[: arguments.windows], windows[arguments.windows :].split(BATCH)
    found: dict[str, dict[str, float]] = {name: {} for name in rows()}
    for bits in arguments.activation_bits:
        for name, settings in rows().items():
            how = settings.pop("weights", "descent")
            config = SquatConfig(activation_bits=bits, **settings)
            model = copy.deepcopy(original)
            with progress(f"A{bits}, {name}") as tell:
                quantize(model, config, seen.split(BATCH), how, tell)
            found[name][f"A{bits}"] = distance(original, model, others).kl
            if arguments.json is not None:
                with writing(arguments.json) as out:
                    out.write(json.dumps(found, indent=1).encode())
    table = Table("", *(f"KL, W4A{bits}" for bits in arguments.activation_bits))
    for name, row in found.items():
        table.add_row(name, *(f"{kl:.3f}" for kl in row.values()))
    show(table)


if __name__ == "__main__":
    main()
