"""What a token costs as context, model size and threads grow: `squat bench` on random weights, W4A8.

    python benchmarks/scaling.py [--output docs/benchmarks]

Writes scaling.json, scaling.md and scaling.png. Results are kept as they come; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from peer_report import markdown

from squat.bench import SHAPES, Settings, run

CONTEXTS = (128, 256, 512, 1024, 2048)
CONTEXT_SHAPE = "llama-58m"
SIZES = (
    "llama-6m",
    "llama-20m",
    "llama-58m",
    "llama-110m",
    "llama-220m",
    "llama-360m",
    "llama-500m",
)
THREADS = (1, 2)
GENERATE, ROUNDS = 32, 5
COLORS = {1: "#22303c", 2: "#d9542b"}


def cases() -> list[tuple[str, int]]:
    """Shapes and prompts: every context with one shape, every size with one context."""
    contexts = [(CONTEXT_SHAPE, context) for context in CONTEXTS]
    return contexts + [(size, CONTEXTS[0]) for size in SIZES if size != CONTEXT_SHAPE]


def measure(file: Path) -> list[dict[str, Any]]:
    """All cases, from the file or measured."""
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["shape"], row["prompt"]) for row in rows}
    for shape, prompt in cases():
        if (shape, prompt) in done:
            continue
        settings = Settings(
            shape=shape, threads=THREADS, prompt=prompt, generate=GENERATE, rounds=ROUNDS
        )
        rows += [found.as_json() for found in run(settings)]
        file.write_text(json.dumps(rows, indent=1) + "\n")
        print(shape, prompt, flush=True)
    return rows


def milliseconds(row: dict[str, Any]) -> tuple[float, float]:
    """A prompt token's and a new token's cost."""
    return 1e3 / row["prefill_tokens_per_s"], 1e3 / row["decode_tokens_per_s"]


def table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        prefill, decode = milliseconds(row)
        size = f"{SHAPES[row['shape']].parameters / 1e6:.0f}M"
        where = [row["shape"], size, str(row["prompt"]), str(row["threads"])]
        cells.append([*where, f"{prefill:.3f}", f"{decode:.3f}"])
    headings = [
        "shape",
        "parameters",
        "context",
        "threads",
        "prefill, ms/token",
        "decode, ms/token",
    ]
    return markdown(headings, cells)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Cost against context, and against size, of a prompt token and of a new one."""
    out = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = out.subplots(1, 2)
    for threads in THREADS:
        mine = [row for row in rows if row["threads"] == threads]
        by_context = [row for row in mine if row["shape"] == CONTEXT_SHAPE]
        by_size = [row for row in mine if row["prompt"] == CONTEXTS[0]]
        by_size.sort(key=lambda row: SHAPES[row["shape"]].parameters)
        for axes, chosen, where in (
            (left, by_context, [row["prompt"] for row in by_context]),
            (right, by_size, [SHAPES[row["shape"]].parameters / 1e6 for row in by_size]),
        ):
            for phase, style in ((0, "o-"), (1, "s--")):
                label = f"{('prefill', 'decode')[phase]}, {threads} thread{'s' * (threads > 1)}"
                values = [milliseconds(row)[phase] for row in chosen]
                axes.plot(where, values, style, color=COLORS[threads], label=label, markersize=4)
    left.set_xlabel(f"tokens in context, {CONTEXT_SHAPE}")
    right.set_xlabel(f"million parameters, context {CONTEXTS[0]}")
    left.set_ylabel("ms/token")
    left.set_ylim(bottom=0)
    right.set_xscale("log")
    right.set_yscale("log")
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rows = measure(output / "scaling.json")
    (output / "scaling.md").write_text(table(rows) + "\n")
    figure(rows).savefig(output / "scaling.png", dpi=100)


if __name__ == "__main__":
    main()
