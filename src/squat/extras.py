"""What is not installed with Squat, but with an extra of it: all but what runs a .gguf file."""

from __future__ import annotations

import re
from collections import defaultdict
from importlib.metadata import requires

_OTHER_MODULES = {"pyyaml": "yaml"}
"""Of packages whose module has another name."""


def extras() -> dict[str, list[str]]:
    """The packages of each extra, as this installation declares them."""
    found = defaultdict(list)
    for line in requires("squat") or ():
        declared = re.match(r"([\w.-]+)\b(?!\[).*extra == ['\"](\w+)", line)
        if declared and declared[2] != "dev":
            found[declared[2]].append(declared[1].lower())
    return dict(found)


def what_to_install(error: ModuleNotFoundError) -> str | None:
    """What to install, where a module of an extra is missing; None where something else is wrong."""
    modules = {_OTHER_MODULES.get(package, package) for package in extras().get("train", ())}
    if error.name not in modules:
        return None
    return f"{error.name} is not installed, and this needs it: pip install 'squat[train]'"
