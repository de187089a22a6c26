"""Tables and figures from the results of `peers.py`: medians over the rounds, spread beside them."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from squat.bench import SHAPES, spread
from squat.report.figures import comparison_figure

PROMPT = GENERATE = 128
PHASES = ("prefill", "decode")
Results = dict[tuple[str, str, int], list[dict[str, Any]]]
"""Rows of the rounds by peer, shape and threads."""
OURS = {"8-bit head": ("Squat W4A8", 4, 8), "4-bit head": ("Squat W4A8, 4-bit head", 4, 4)}
"""The rows that the goals are about: name, bits of the layers' weights and of the head."""
TABLE_IV = {
    "llama.cpp F16": "F16 (llama.cpp)",
    "Squat W8A8": "W8A8",
    "Squat W4A8": "W4A8",
    "Squat W4 4:8 at 1:3": "4:8 at 1:3",
    "Squat W4 4:8 at 1:1": "4:8 at 1:1",
    "Squat W4 4:8 at 3:1": "4:8 at 3:1",
    "Squat W4A4": "W4A4",
}


def write_report(results: Path, output: Path) -> None:
    """Write peers.md, peers.json, peers.png and roofline.png."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    groups: Results = defaultdict(list)
    for row in rows:
        groups[row["peer"], row["shape"], row["threads"]].append(row)
    output.mkdir(parents=True, exist_ok=True)
    table = [summary(key, group) for key, group in groups.items() if key[0] != "limits"]
    (output / "peers.json").write_text(json.dumps(table, indent=1) + "\n")
    text = [origin(rows), *(section(groups, shape) for shape in shapes(groups))]
    (output / "peers.md").write_text("\n\n".join(text) + "\n")
    peers_figure(groups).savefig(output / "peers.png", dpi=100)
    roofline_figure(groups).savefig(output / "roofline.png", dpi=100)


def shapes(groups: Results) -> list[str]:
    return [name for name in SHAPES if any(shape == name for _, shape, _ in groups)]


def threads_of(groups: Results, shape: str) -> list[int]:
    return sorted({threads for _, found, threads in groups if found == shape})


def peers_of(groups: Results, shape: str) -> list[str]:
    return list(dict.fromkeys(p for p, found, _ in groups if found == shape and p != "limits"))


def origin(rows: Sequence[dict[str, Any]]) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    times = [row["time"] for row in rows]
    return f"CPU: {rows[0]['cpu']}. Measured {min(times)} to {max(times)}, at commit {commits}."


def summary(key: tuple[str, str, int], group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    peer, shape, threads = key
    out: dict[str, Any] = {"peer": peer, "shape": shape, "threads": threads}
    for phase in PHASES:
        values = [row[phase] for row in group]
        out[f"{phase}_tokens_per_s"] = round(statistics.median(values), 1)
        out[f"{phase}_spread"] = round(spread(values), 4)
    return out | {"rounds": len(group), "model_bytes": group[0]["bytes"]}


def median(groups: Results, peer: str, shape: str, threads: int, phase: str) -> float | None:
    values = [row[phase] for row in groups.get((peer, shape, threads), ())]
    return statistics.median(values) if values else None


def cell(groups: Results, peer: str, shape: str, threads: int, phase: str) -> str:
    values = [row[phase] for row in groups.get((peer, shape, threads), ())]
    if not values:
        return "-"
    return f"{statistics.median(values):,.0f} ± {50 * spread(values):.0f} %"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(groups: Results, shape: str) -> str:
    """Everything about one shape."""
    counts = threads_of(groups, shape)
    speed = markdown(
        ["", "MB", *(f"{phase}, {n} thread{'s' * (n > 1)}" for n in counts for phase in PHASES)],
        [
            [peer, f"{size(groups, peer, shape):.1f}"]
            + [cell(groups, peer, shape, n, phase) for n in counts for phase in PHASES]
            for peer in peers_of(groups, shape)
        ],
    )
    rounds = min(len(group) for (_, found, _), group in groups.items() if found == shape)
    parts = [
        f"## {shape}",
        f"Tokens/s, median of at least {rounds} rounds ± half the interquartile range; prompt 128, then "
        f"128 new tokens at batch 1.\n\n{speed}",
    ]
    for n in counts:
        parts.append(f"### {shape}, {n} thread{'s' * (n > 1)}")
        parts.append(goals(groups, shape, n))
        parts.append(table_iv(groups, shape, n))
    return "\n\n".join(parts)


def size(groups: Results, peer: str, shape: str) -> float:
    return next(g[0]["bytes"] / 1e6 for (p, s, _), g in groups.items() if (p, s) == (peer, shape))


def goals(groups: Results, shape: str, threads: int) -> str:
    """Ours over the fastest peer, and the share of the machine's limits that is reached."""
    rows = []
    for head, (name, *bits) in OURS.items():
        for phase in PHASES:
            ours = median(groups, name, shape, threads, phase)
            others = {
                peer: value
                for peer in peers_of(groups, shape)
                if not peer.startswith("Squat")
                and (value := median(groups, peer, shape, threads, phase)) is not None
            }
            if ours is None or not others:
                continue
            best = max(others, key=others.__getitem__)
            share = limit_share(groups, shape, threads, phase, ours, *bits)
            fastest, ratio = f"{best}: {others[best]:,.0f}", f"{ours / others[best]:.2f}x"
            rows.append([phase, head, f"{ours:,.0f}", fastest, ratio, share])
    return markdown(["", "W4A8 with", "ours", "fastest peer", "ratio", "share of the limit"], rows)


def limits_of(groups: Results, shape: str, threads: int) -> dict[str, float]:
    """Medians of the machine's limits in the same rounds: 10^9 MAC/s and 10^9 B/s."""
    rounds = groups[("limits", shape, threads)]
    return {
        "dot": statistics.median(max(row["dot_gmacs"].values()) for row in rounds),
        **{
            level: statistics.median(row["read_gbs"][level] for row in rounds)
            for level in rounds[0]["read_gbs"]
        },
    }


def limit_share(
    groups: Results, name: str, threads: int, phase: str, speed: float, bits: int, head_bits: int
) -> str:
    """Prefill: of the int8 dot products; decoding: of reading as many bytes as a token needs, over and over.

    A token needs all weights and, on average, the cache of the prompt and half of the new tokens; what is
    credited are the weights alone.
    """
    limits, shape = limits_of(groups, name, threads), SHAPES[name]
    if phase == "prefill":
        reached = shape.prefill_macs(PROMPT) / (PROMPT / speed) * 1e-9
        return f"{100 * reached / limits['dot']:.0f} % of {limits['dot']:.0f} GMAC/s"
    weights = (shape.layer_weights * bits + shape.head_weights * head_bits) / 8
    cache = 2 * shape.layers * shape.hidden * (PROMPT + GENERATE / 2)
    sizes = {int(level.split()[0]) * 2**20: level for level in limits if level.endswith("MiB")}
    level = sizes[min((size for size in sizes if size >= weights + cache), default=max(sizes))]
    reached = weights * speed * 1e-9
    return f"{100 * reached / limits[level]:.0f} % of {limits[level]:.0f} GB/s ({level})"


def table_iv(groups: Results, shape: str, threads: int) -> str:
    """The paper's Table IV on this machine."""
    rows = []
    base = {p: median(groups, "llama.cpp F16", shape, threads, p) for p in PHASES}
    for peer, label in TABLE_IV.items():
        speeds = {p: median(groups, peer, shape, threads, p) for p in PHASES}
        if None in speeds.values():
            continue
        row = [label, f"{size(groups, peer, shape):.1f}"]
        for phase in PHASES:
            ratio = "" if not base[phase] else f" ({speeds[phase] / base[phase]:.2f}x)"
            row.append(f"{1e3 / speeds[phase]:.3f}{ratio}")
        rows.append(row)
    return markdown(["", "MB", "prefill, ms/token", "decode, ms/token"], rows)


def peers_figure(groups: Results) -> Figure:
    """Bars of every peer, one thread: the figures that other load disturbs least."""
    names = shapes(groups)
    units = {f"{s} {p}": f"{s}: {p}, tokens/s" for s in names for p in PHASES}
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for shape in names:
        for peer in peers_of(groups, shape):
            for phase in PHASES:
                value = median(groups, peer, shape, threads_of(groups, shape)[0], phase)
                if value is not None:
                    rows[peer][f"{shape} {phase}"] = value
    return comparison_figure("One thread; random weights, prompt 128 + 128 new tokens", rows, units)


def roofline_figure(groups: Results) -> Figure:
    """What the arithmetic intensity allows, and what is reached."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    name = shapes(groups)[0]
    panels = figure.subplots(1, len(threads_of(groups, name)), sharey=True, squeeze=False)[0]
    for axes, threads in zip(panels, threads_of(groups, name), strict=True):
        limits = limits_of(groups, name, threads)
        intensities = [2**e for e in range(9)]
        for level, color in (("24 MiB", "#22303c"), ("1024 MiB", "#9fb3c8")):
            roof = [min(limits["dot"], x * limits[level]) for x in intensities]
            axes.plot(intensities, roof, color=color, label=f"reading {level}")
        for shape_name in shapes(groups):
            shape = SHAPES[shape_name]
            for label, (peer, bits, head_bits) in OURS.items():
                weights = (shape.layer_weights * bits + shape.head_weights * head_bits) / 8
                for phase, marker, tokens, macs in (
                    ("prefill", "o", PROMPT, shape.prefill_macs(PROMPT)),
                    ("decode", "s", 1, shape.layer_weights + shape.head_weights),
                ):
                    speed = median(groups, peer, shape_name, threads, phase)
                    if speed is None or (label == "4-bit head" and phase == "prefill"):
                        continue
                    x, y = macs / weights, macs * speed / tokens * 1e-9
                    color = "#d9542b" if shape_name.startswith("llama") else "#3b7ea1"
                    axes.plot(x, y, marker, color=color, label=f"{shape_name} {phase}, {label}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("multiply-accumulates per byte of weights")
        axes.set_title(f"{threads} thread{'s' * (threads > 1)}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GMAC/s")
    panels[-1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure
