"""What `squat info` shows: versions, the CPU, and which kernel computes which product."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from squat import __version__, _native


def info_table() -> Table:
    """Two columns: a thing and what it is here."""
    table = Table(title=f"Squat {__version__}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("Python", platform.python_version())
    for package in ("torch", "transformers", "gguf"):
        table.add_row(package, _version(package))
    table.add_row("CPU", f"{platform.machine()}: {', '.join(_native.cpu_features()) or 'baseline'}")
    compiled: dict[str, bool] = {}
    for row in _native.kernels():
        compiled[row["isa"]] = row["runs_here"]
    table.add_row("kernels compiled for", ", ".join(compiled))
    table.add_row("this CPU runs", ", ".join(isa for isa, runs in compiled.items() if runs))
    for product, reason in _native.chosen_kernels().items():
        table.add_row(product, reason)
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
