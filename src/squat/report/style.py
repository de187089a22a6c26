"""How every figure looks: few colours, no boxes, text that can be read on a phone."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

INK, ACCENT, SOFT, SECOND = "#22303c", "#d9542b", "#9fb3c8", "#2a7f8e"
SERIES = (INK, SOFT, ACCENT, SECOND, "#b8860b", "#7a5195")
"""Colours of several models in one panel, in the order given."""
MAP = "magma_r"
"""Colour map of probabilities."""


def figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure in inches, without a display."""
    made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK)
    return made


def tidy(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Title and labels in one size, no box around the panel."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
