"""Squat: small language models in 4 bits on the CPU of a phone or a Raspberry Pi.

`import squat` is light. The names of the training half (`squat.SquatConfig`, `squat.quantize`,
`squat.SquatTrainer`) load torch and transformers when they are touched, and register the checkpoint
format with transformers; `squat.load("model.gguf")`, a `squat.Engine`, needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from squat.extras import what_to_install

__version__ = "0.2.0"

_HOMES = {
    "Engine": "squat.engine",
    "load": "squat.engine",
    "SquatConfig": "squat.quantization",
    "quantize": "squat.quantization",
    "LossConfig": "squat.distill",
    "SquatTrainer": "squat.distill",
    "SquatError": "squat.errors",
}

__all__ = ["Engine", "LossConfig", "SquatConfig", "SquatError", "SquatTrainer", "load", "quantize"]

if TYPE_CHECKING:
    from squat.distill import LossConfig, SquatTrainer
    from squat.engine import Engine, load
    from squat.errors import SquatError
    from squat.quantization import SquatConfig, quantize


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'squat' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if (missing := what_to_install(error)) is None:
            raise
        raise ModuleNotFoundError(f"squat.{name}: {missing}", name=error.name) from None
    return getattr(home, name)
