"""From tokenizer.json to the `tokenizer.ggml.*` keys, for readers without the tokenizers library.

Two kinds of byte-pair encoding can be expressed: GPT-2's byte-level kind, with or without splitting
digits (`tokenizer.ggml.pre` = `gpt-2`, `smollm`), and Llama's SentencePiece kind with byte fallback. The
merges are written for both; llama.cpp ignores them for the second kind and merges by score instead, which
is the negative rank of the first merge that makes a token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from squat.errors import CheckpointError

SPACE = "▁"
"""U+2581, SentencePiece's visible space."""


class TokenType(IntEnum):
    """llama.cpp's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class GgmlTokenizer:
    """The values of the `tokenizer.ggml.*` keys; `nfkc` is `squat.tokenizer.nfkc`."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] = field(default_factory=list)
    nfkc: bool = False
    add_space_prefix: bool = False
    bos_token: str | None = None
    """The token that the tokenizer itself puts in front of a text, if it does."""
    unknown_token: str | None = None


def _refuse(what: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: {what} cannot be expressed in a GGUF file; a byte-level BPE as GPT-2's or a "
        f"SentencePiece BPE with byte fallback as Llama's can"
    )


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A component as the list of its parts: a Sequence's, the component alone, or none."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _vocabulary(
    data: dict[str, Any], vocab_size: int, byte_fallback: bool
) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the tokenizer does not use become [PAD7]-like entries."""
    model = data["model"]
    tokens: dict[int, tuple[str, TokenType]] = {}
    for text, index in model["vocab"].items():
        is_byte = byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None
        tokens[index] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in data.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["content"] == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens[added["id"]] = (added["content"], kind)
    if tokens and max(tokens) >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json: token {max(tokens)} is outside the model's vocabulary of {vocab_size}; "
            f"the tokenizer does not belong to this model"
        )
    table = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return [text for text, _ in table], [int(kind) for _, kind in table]


def _added_in_front(data: dict[str, Any]) -> str | None:
    """The token that the post-processor puts before a text."""
    for step in _steps(data.get("post_processor"), "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise _refuse(f"post-processor {step['type']}")
        template = [next(iter(item.items())) for item in step["single"]]
        kinds = [kind for kind, _ in template]
        if kinds == ["Sequence"]:
            continue
        if kinds != ["SpecialToken", "Sequence"]:
            raise _refuse("a template other than one token before the text")
        return str(template[0][1]["id"])
    return None


def _byte_level(
    data: dict[str, Any], steps: list[dict[str, Any]], tokenizer: GgmlTokenizer
) -> None:
    """Fill in what the pre-tokenizer of a byte-level BPE says."""
    *before, last = steps
    if not last.get("use_regex", True):
        raise _refuse("a byte-level BPE with another pattern than GPT-2's")
    if before and [(s["type"], s.get("individual_digits")) for s in before] != [("Digits", True)]:
        raise _refuse(f"pre-tokenizer {before[0]['type']}")
    if data["model"].get("ignore_merges"):
        raise _refuse("a BPE that ignores merges")
    tokenizer.pre = "smollm" if before else "gpt-2"
    # Digits come first: the prefix then goes to every piece, which no reader does.
    if before and last["add_prefix_space"]:
        raise _refuse("splitting digits with a space before the text")
    tokenizer.add_space_prefix = last["add_prefix_space"]


def _sentencepiece(
    normalizers: list[dict[str, Any]], steps: list[dict[str, Any]], tokenizer: GgmlTokenizer
) -> None:
    """Fill in what the normalizer or pre-tokenizer of a SentencePiece BPE says about spaces."""
    prepends = [n for n in normalizers if n == {"type": "Prepend", "prepend": SPACE}]
    replaces = [
        n
        for n in normalizers
        if n["type"] == "Replace" and n["pattern"] == {"String": " "} and n["content"] == SPACE
    ]
    if len(prepends) + len(replaces) != len(normalizers):
        raise _refuse("its normalizer")
    if not steps and replaces:
        tokenizer.add_space_prefix = bool(prepends)
        return
    if [s["type"] for s in steps] != ["Metaspace"] or normalizers:
        raise _refuse("its pre-tokenizer")
    space = steps[0]
    if space["replacement"] != SPACE or space.get("split", True):
        raise _refuse("a Metaspace that splits words")
    tokenizer.add_space_prefix = space.get("prepend_scheme", "always") != "never"


def ggml_tokenizer(tokenizer_json: str, vocab_size: int) -> GgmlTokenizer:
    """The `tokenizer.ggml.*` values of a tokenizer.json for a model of `vocab_size` tokens.

    Raises:
        CheckpointError: it is no tokenizer.json, does not fit the model, or is of another kind.
    """
    try:
        data = json.loads(tokenizer_json)
        model = data["model"]
        kind = model["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"tokenizer.json: is not one ({error!r})") from None
    if kind != "BPE":
        raise _refuse(f"a {kind} model")
    pre_tokenizers = _steps(data.get("pre_tokenizer"), "pretokenizers")
    normalizers = _steps(data.get("normalizer"), "normalizers")
    nfkc = bool(normalizers) and normalizers[0] == {"type": "NFKC"}
    byte_level = bool(pre_tokenizers) and pre_tokenizers[-1]["type"] == "ByteLevel"
    tokens, types = _vocabulary(data, vocab_size, not byte_level)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokenizer = GgmlTokenizer(
        model="gpt2" if byte_level else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        merges=merges,
        nfkc=nfkc,
        bos_token=_added_in_front(data),
        unknown_token=model.get("unk_token"),
    )
    rest = normalizers[1:] if nfkc else normalizers
    if byte_level:
        if rest:
            raise _refuse(f"normalizer {rest[0]['type']}")
        _byte_level(data, pre_tokenizers, tokenizer)
        return tokenizer
    if not model.get("byte_fallback"):
        raise _refuse("a BPE without byte fallback")
    _sentencepiece(rest, pre_tokenizers, tokenizer)
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ", 1)), index)
    tokenizer.scores = [-float(rank[t]) if t in rank else 0.0 for t in tokens]
    return tokenizer
