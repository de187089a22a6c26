"""One file a family of architectures; a new one is a file here and a row in `ARCHITECTURES`.

An architecture says where the quantized sites are in a decoder of transformers, which of its float modules
are made exact, and how it is written to a file, where a description of what is computed stands beside the
codes: the engine knows building blocks, not names.
"""

from __future__ import annotations

from squat.architectures.architecture import Architecture
from squat.architectures.gemma3 import GEMMA3
from squat.architectures.gpt2 import GPT2
from squat.architectures.gpt_neox import GPT_NEOX
from squat.architectures.granite import GRANITE
from squat.architectures.lfm2 import LFM2
from squat.architectures.llama import LLAMA, MISTRAL, QWEN2, SMOLLM3
from squat.architectures.olmo2 import OLMO2
from squat.architectures.qwen3 import QWEN3
from squat.errors import ConfigError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "smollm3": SMOLLM3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "lfm2": LFM2,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
}
"""By transformers' `model_type`."""


def architecture_of(model_type: str) -> Architecture:
    """The row of an architecture; an unknown one raises ConfigError."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(
            f"model_type: architecture {model_type!r} has no row in "
            f"squat.architectures.ARCHITECTURES; there is one for {known}"
        ) from None
