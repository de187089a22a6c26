"""What `squat info` shows: versions, the machine, what is installed, which kernel computes which product."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from squat import __version__, _native
from squat.extras import extras


def facts() -> dict[str, str]:
    """A thing, and what it is here."""
    found = {"Squat": __version__, "Python": platform.python_version()}
    found["CPU"] = f"{platform.machine()}: {', '.join(_native.cpu_features()) or 'baseline'}"
    found["threads"] = f"{_cpus()}, one for each CPU that this process may use"
    if memory := _memory():
        found["memory"] = memory
    compiled: dict[str, bool] = {}
    for row in _native.kernels():
        compiled[row["isa"]] = row["runs_here"]
    found["kernels compiled for"] = ", ".join(compiled)
    found["this CPU runs"] = ", ".join(isa for isa, runs in compiled.items() if runs)
    for extra, packages in extras().items():
        found[f"extra {extra}"] = _state(extra, packages)
    return found | _native.chosen_kernels()


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str | None:
    """What the machine has and what is free of it, where the system says."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (
            os.sysconf(name) * page / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        )
    except (ValueError, OSError, AttributeError):
        return None
    return f"{total:.1f} GB, of which {free:.1f} GB are free"


def _state(extra: str, packages: list[str]) -> str:
    """Versions of an extra's packages, or what is missing and how to have it."""
    versions, missing = [], []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return f"lacks {', '.join(missing)}: pip install 'squat[{extra}]'"
    return ", ".join(versions)
