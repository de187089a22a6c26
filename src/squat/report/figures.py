"""The figures of training runs and of the demo, as matplotlib figures without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_INK, _ACCENT, _SOFT = "#22303c", "#d9542b", "#9fb3c8"
LOSS_TERMS = ("loss", "ce", "kl", "entropy", "distribution", "wide_share")


def loss_figure(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Every logged loss term over the steps, one panel each.

    Args:
        log: entries with `step` and any of the terms of `squat.distill.losses`.
    """
    shown = [term for term in LOSS_TERMS if any(term in entry for entry in log)]
    figure = Figure(figsize=(2.6 * len(shown), 2.6), layout="constrained")
    for axes, term in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        points = [(entry["step"], float(entry[term])) for entry in log if term in entry]
        axes.plot(*zip(*points, strict=True), color=_ACCENT if term == "loss" else _INK)
        axes.set_title(term, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def comparison_figure(
    title: str, rows: Mapping[str, Mapping[str, float]], units: Mapping[str, str]
) -> Figure:
    """Horizontal bars: one panel a measure, one bar a model.

    Args:
        title: of the figure.
        rows: model -> measure -> value; a measure that a model has not leaves its place empty.
        units: measure -> label of its panel; the order of the panels.
    """
    names = list(rows)
    figure = Figure(figsize=(3.3 * len(units) + 1.2, 0.45 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(units), sharey=True, squeeze=False)[0]
    for axes, (measure, label) in zip(panels, units.items(), strict=True):
        values = [rows[name].get(measure) for name in names]
        colors = [_ACCENT if name.startswith("Squat") else _SOFT for name in names]
        bars = axes.barh(names, [value or 0.0 for value in values], color=colors)
        axes.bar_label(bars, [_label(value) for value in values], padding=3, fontsize=9, color=_INK)
        axes.set_title(label, fontsize=10, loc="left")
        axes.margins(x=0.2)
        axes.invert_yaxis() if axes is panels[0] else None
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=_INK)
    return figure


def _label(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
