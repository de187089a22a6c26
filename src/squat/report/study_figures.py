"""The figures of the studies: sensitivity, distributions, attention, token widths, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from squat.evaluate.observation import Observation, entropy_bits
from squat.evaluate.sensitivity import Effect
from squat.report.style import ACCENT, INK, MAP, SECOND, SERIES, SOFT, figure, tidy

BINS = 64


def sensitivity_figure(effects: Sequence[Effect], title: str) -> Figure:
    """Added loss and KL of every group, as bars, one colour a kind of group."""
    colours = {"module": ACCENT, "site": SECOND, "layer": SOFT}
    made = figure(8.4, 0.24 * len(effects) + 1.3, title)
    left, right = made.subplots(1, 2, sharey=True)
    names = [effect.name for effect in effects]
    for axes, measure, label in (
        (left, "added", "loss added, nats per token"),
        (right, "kl", "KL to full precision, nats"),
    ):
        values = [getattr(effect, measure) for effect in effects]
        bars = axes.barh(names, values, color=[colours[effect.kind] for effect in effects])
        axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=7, color=INK)
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=5)
        tidy(axes, label)
    left.invert_yaxis()
    patches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    right.legend(handles=patches, fontsize=8, frameon=False, loc="lower right")
    return made


def distribution_figure(seen: Mapping[str, Observation], layer: int) -> Figure:
    """Histograms of q and of k in one layer: one column a model, the same bins for all."""
    made = figure(
        2.7 * len(seen) + 0.4, 4.4, f"Queries and keys of layer {layer}, as the product takes them"
    )
    panels = made.subplots(2, len(seen), sharex="row", squeeze=False)
    for row, part in enumerate(("query", "key")):
        edges = bin_edges(seen, part, layer)
        for axes, (name, observation) in zip(panels[row], seen.items(), strict=True):
            values = getattr(observation, part)[layer]
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts / counts.sum(), edges, fill=True, color=ACCENT if row else SECOND)
            tidy(axes, f"{name}: {part}" if row == 0 else part)
            axes.set_yticks([])
            axes.text(
                0.98,
                0.95,
                f"variance {values.var():.2f}\nentropy {entropy_bits(counts):.2f} bits",
                transform=axes.transAxes,
                ha="right",
                va="top",
                fontsize=8,
                color=INK,
            )
    return made


def bin_edges(seen: Mapping[str, Observation], part: str, layer: int) -> np.ndarray:
    """The same for every model: the range of the first one, between its 0.1 % quantiles, and a little."""
    values = getattr(next(iter(seen.values())), part)[layer]
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.15 * (high - low)
    return np.linspace(low - margin, high + margin, BINS + 1)


def maps_figure(seen: Mapping[str, Observation], layers: Sequence[int]) -> Figure:
    """Head-averaged attention maps: one column a model, one row a layer; square root for the eye."""
    made = figure(2.3 * len(seen) + 0.6, 2.3 * len(layers) + 0.5, "Attention, averaged over heads")
    panels = made.subplots(len(layers), len(seen), sharex=True, sharey=True, squeeze=False)
    for row, layer in enumerate(layers):
        for axes, (name, observation) in zip(panels[row], seen.items(), strict=True):
            seen_keys = np.tri(len(observation.maps[layer]), dtype=bool)
            shown = np.where(seen_keys, np.sqrt(observation.maps[layer]), np.nan)
            image = axes.imshow(shown, cmap=MAP, vmin=0, vmax=1)
            tidy(axes, name if row == 0 else "")
            if axes is panels[row][0]:
                axes.set_ylabel(f"layer {layer}: from token", fontsize=8)
            if row == len(layers) - 1:
                axes.set_xlabel("to token", fontsize=8)
    bar = made.colorbar(image, ax=panels, shrink=0.5, aspect=25)
    ticks = (0.0, 0.1, 0.3, 0.6, 1.0)
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=8)
    return made


def first_column_figure(seen: Mapping[str, Observation], layers: Sequence[int]) -> Figure:
    """Attention to the first token over the position of the token that looks, one panel a layer."""
    made = figure(3.0 * len(layers) + 0.4, 3.0, "Attention to the first token, by position")
    panels = made.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        positions = np.arange(1, len(next(iter(seen.values())).first_column[layer]))
        axes.plot(positions, 1 / (positions + 1), color=SOFT, linestyle=":", linewidth=1)
        for colour, observation in zip(SERIES, seen.values(), strict=False):
            axes.plot(positions, observation.first_column[layer][1:], color=colour, linewidth=1.2)
        axes.set_yscale("log")
        tidy(axes, f"layer {layer}", "position")
    panels[0].set_ylabel("mean probability", fontsize=9)
    lines = [
        Line2D([], [], color=colour, label=name) for colour, name in zip(SERIES, seen, strict=False)
    ]
    lines.append(Line2D([], [], color=SOFT, linestyle=":", label="uniform attention"))
    panels[-1].legend(handles=lines, fontsize=7, frameon=False)
    return made


def widths_figure(name: str, widths: np.ndarray, tokens: Sequence[str]) -> Figure:
    """Which tokens got 8 bits, layer by layer, with the text under it, in lines of 24 tokens."""
    width = 24
    rows = [slice(start, start + width) for start in range(0, len(tokens), width)]
    layers = len(widths)
    made = figure(
        0.36 * width + 0.9,
        len(rows) * (0.2 * layers + 1.15) + 0.4,
        f"{name}: tokens with 8 bits (coloured) and with 4, by layer",
    )
    for axes, row in zip(made.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        shown = np.full((layers, width), np.nan)
        shown[:, : len(tokens[row])] = widths[:, row]
        axes.imshow(shown, cmap=_two_colours(), vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(tokens[row])), tokens[row], rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(layers), range(layers), fontsize=7)
        axes.set_xticks(np.arange(-0.5, width), minor=True)
        axes.set_yticks(np.arange(-0.5, layers), minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer", fontsize=8)
    return made


def _two_colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#dbe4ee", ACCENT]).with_extremes(bad="white")


def ablation_figure(rows: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> Figure:
    """Runs of a sweep side by side: one panel a measure, mean over seeds, a line for the spread.

    Args:
        rows: run -> measure -> mean; and measure + " ±" -> standard deviation where there are seeds.
        labels: measure -> title of its panel; the order of the panels.
    """
    names = list(rows)
    made = figure(3.2 * len(labels) + 1.4, 0.36 * len(names) + 1.3, "Runs side by side")
    panels = made.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, (measure, label) in zip(panels, labels.items(), strict=True):
        values = [rows[name].get(measure, np.nan) for name in names]
        spread = [rows[name].get(f"{measure} ±", 0.0) for name in names]
        colours = [ACCENT if name.startswith("squat") else SOFT for name in names]
        finite = [value for value in values if not np.isnan(value)]
        if min(finite) > 0.5 * max(finite):
            # Differences are what there is to see; bars that do not begin at zero would show ratios.
            axes.errorbar(values, names, xerr=spread, fmt="none", ecolor=INK, elinewidth=1)
            axes.scatter(values, names, color=colours, zorder=3)
        else:
            line = {"ecolor": INK, "elinewidth": 1}
            axes.barh(names, values, xerr=spread, color=colours, error_kw=line)
        for name, value, error in zip(names, values, spread, strict=True):
            if not np.isnan(value):
                axes.annotate(
                    f"{value:.3g}",
                    (value + error, name),
                    xytext=(7, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=INK,
                )
        axes.margins(x=0.25)
        tidy(axes, label)
    panels[0].invert_yaxis()
    return made


def mixed_widths_figure(
    uniform: Sequence[tuple[float, float]], mixed: Sequence[tuple[float, float, str]]
) -> Figure:
    """Loss over the average activation width: uniform widths as a line, mixed 4/8 runs as points."""
    made = figure(6.0, 3.8, "Mixed 4/8 bits by token against one width for all")
    axes = made.subplots()
    if uniform:
        axes.plot(*zip(*sorted(uniform), strict=True), color=INK, marker="o", label="uniform")
    for index, (bits, loss, name) in enumerate(mixed):
        axes.plot(bits, loss, "D", color=ACCENT, label="" if index else "4/8 by token")
        axes.annotate(name, (bits, loss), xytext=(5, 4), textcoords="offset points", fontsize=7)
    tidy(axes, "", "average bits of a token's activations", "loss on held-out text, nats per token")
    axes.legend(fontsize=8, frameon=False)
    return made
