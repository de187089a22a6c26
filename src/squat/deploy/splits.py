"""How a byte-level BPE splits a text before the merges, by the names of `tokenizer.ggml.pre`.

A .gguf file has the name only. Reading another program's file goes from the name to the split, writing ours
from the split of a tokenizer.json to the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex
from tokenizers import pre_tokenizers as splitting

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the tokenizers library's ByteLevel splits by, unless it is told not to."""


@dataclass(frozen=True)
class Split:
    """How a text is split before the merges of a byte-level BPE.

    digits: every digit by itself, first.
    pattern: the pieces.
    whole: a piece that is a token is that token, whatever the merges say.
    bos: llama.cpp puts bos in front unless a file says otherwise.
    """

    digits: bool = False
    pattern: str = GPT2_PATTERN
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> splitting.PreTokenizer:
        """As the tokenizers library has it."""
        if self.pattern != GPT2_PATTERN:
            pieces = splitting.Split(Regex(self.pattern), "isolated")
            byte_level = splitting.ByteLevel(add_prefix_space=False, use_regex=False)
            return splitting.Sequence([pieces, byte_level])
        byte_level = splitting.ByteLevel(add_prefix_space=False)
        if self.digits:
            return splitting.Sequence([splitting.Digits(individual_digits=True), byte_level])
        return byte_level


def _words(digits: str) -> str:
    """Llama 3's and Qwen2's pattern, which differ in how many digits a piece has."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = Split()
_DIGITS = Split(digits=True)
_LLAMA3 = Split(pattern=_words(r"\p{N}{1,3}"), whole=True, bos=True)
_DBRX = Split(pattern=_words(r"\p{N}{1,3}"))
_QWEN2 = Split(pattern=_words(r"\p{N}"))

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "trillion"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
}
"""By `tokenizer.ggml.pre`, as llama.cpp's src/llama-vocab.cpp has it. The first name of a split is written;
native/text/pre_tokenizer.cpp has a row for each of these."""


def split_name(steps: list[dict[str, Any]], whole: bool) -> str | None:
    """The name of a byte-level BPE's split; None if it has none.

    Args:
        steps: the pre-tokenizers of a tokenizer.json; the last one is ByteLevel.
        whole: whether a piece that is a token is that token, whatever the merges say.
    """
    *before, last = steps
    digits = before[:1] == [{"type": "Digits", "individual_digits": True}]
    patterns = []
    for step in before[1:] if digits else before:
        cuts = (step["type"], step.get("behavior"), step.get("invert")) == (
            "Split",
            "Isolated",
            False,
        )
        patterns.append(step["pattern"].get("Regex") if cuts else None)
    if last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    for name, split in SPLITS.items():
        if (split.digits, [split.pattern], split.whole) == (digits, patterns, whole):
            return name
    return None
