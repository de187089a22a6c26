"""What is not installed with Squat, but with an extra of it: all but what runs a .gguf file."""

from __future__ import annotations

TRAIN = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "gguf",
    "pydantic",
    "yaml",
    "matplotlib",
)


def what_to_install(error: ModuleNotFoundError) -> str | None:
    """What to install, where a module of an extra is missing; None where something else is wrong."""
    if error.name not in TRAIN:
        return None
    return f"{error.name} is not installed, and this needs it: pip install 'squat[train]'"
