"""From tokenizer.json to the `tokenizer.ggml.*` keys, for readers without the tokenizers library.

Two kinds of byte-pair encoding can be expressed: the byte-level kind, with the splits that have a name
(`squat.deploy.splits`), and SentencePiece's kind with byte fallback, Llama's and Gemma's; and SentencePiece's
other model, Unigram. What is done to a
text before, and how added tokens are found in it, stands in keys of ours (docs/format.md). The merges are
written for both kinds; llama.cpp ignores them for the second and merges by score instead, which is the
negative rank of the first merge that makes a token. Everything else is refused, by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from squat.deploy.splits import split_name
from squat.errors import CheckpointError

SPACE = "▁"
"""U+2581, SentencePiece's visible space."""

_NORMALIZERS = {"NFC": "nfc", "NFKC": "nfkc", "Lowercase": "lowercase"}
"""Those that need nothing else, and their names in the file."""
_SPACES = ["replace", " ", SPACE]
"""What makes spaces visible, in words of the file."""
_LONGEST = 64
"""Characters of what a normalizer prepends or replaces."""


class TokenType(IntEnum):
    """llama.cpp's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TokenFlag(IntFlag):
    """How an added token is found in a text (docs/format.md)."""

    SINGLE_WORD = 1
    LSTRIP = 2
    RSTRIP = 4
    NORMALIZED = 8
    OUTSIDE = 16


@dataclass
class GgmlTokenizer:
    """The values of the `tokenizer.ggml.*` keys, and of `squat.tokenizer.*`.

    Args:
        bos: the token that the tokenizer itself puts in front of a text, if it does.
        unknown: the token that stands for what the vocabulary cannot express.
        normalizers: the words of `squat.tokenizer.normalizers`.
        prefix: where a space is put in front of a text that begins with none: "first", "always" or None.
        flags: of added tokens, those that have any.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] = field(default_factory=list)
    normalizers: list[str] = field(default_factory=list)
    prefix: str | None = None
    flags: dict[int, TokenFlag] = field(default_factory=dict)
    bos: int | None = None
    unknown: int | None = None

    @property
    def add_space_prefix(self) -> bool:
        """What llama.cpp is told: a text has a space in front, which decoding takes away again."""
        prepended = zip(self.normalizers, self.normalizers[1:], strict=False)
        return self.prefix is not None or ("prepend", SPACE) in prepended

    @property
    def beyond_ggml(self) -> bool:
        """Whether a reader of the `tokenizer.ggml.*` keys alone would make other tokens of a text."""
        first = ["prepend", SPACE] if self.add_space_prefix else []
        plain: dict[str, list[str]] = {"gpt2": [], "llama": [*first, *_SPACES]}
        prefix = {"gpt2": self.prefix == "first", "llama": self.prefix is not None}
        return (
            bool(self.flags)
            or self.normalizers != plain.get(self.model)
            or prefix.get(self.model, False)
        )


def _refuse(what: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: {what} cannot be expressed in a GGUF file; a byte-level BPE as GPT-2's, SmolLM's, "
        "Llama 3's or Qwen2's can, a SentencePiece BPE with byte fallback as Llama 2's or Gemma's, and a "
        "SentencePiece Unigram model"
    )


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A component as the list of its parts: a Sequence's, the component alone, or none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for one in part[inner] for step in _steps(one, inner)]


def _added_tokens(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens, each with an id of its own."""
    vocab, added = data["model"]["vocab"], data.get("added_tokens") or []
    for token in added:
        if (known := vocab.get(token["content"], token["id"])) != token["id"]:
            raise CheckpointError(
                f"tokenizer.json: added_tokens: {token['content']!r} has id {token['id']}, but {known} in "
                "the vocabulary; save the tokenizer again"
            )
    return added


def _vocabulary(
    data: dict[str, Any], vocab_size: int, byte_fallback: bool
) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the tokenizer does not use become [PAD7]-like entries."""
    model = data["model"]
    tokens: dict[int, tuple[str, TokenType]] = {}
    for text, index in model["vocab"].items():
        is_byte = byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None
        tokens[index] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in _added_tokens(data):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["special"] and added["content"] == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens[added["id"]] = (added["content"], kind)
    if tokens and max(tokens) >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json: token {max(tokens)} is outside the model's vocabulary of {vocab_size}; "
            f"the tokenizer does not belong to this model"
        )
    table = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return [text for text, _ in table], [int(kind) for _, kind in table]


def _flags(data: dict[str, Any]) -> dict[int, TokenFlag]:
    """How added tokens are found, of those of which there is something to say."""
    found = {}
    for token in _added_tokens(data):
        flags = TokenFlag(0)
        for flag in (
            TokenFlag.SINGLE_WORD,
            TokenFlag.LSTRIP,
            TokenFlag.RSTRIP,
            TokenFlag.NORMALIZED,
        ):
            if token[str(flag.name).lower()]:
                flags |= flag
        if token["content"] not in data["model"]["vocab"]:
            flags |= TokenFlag.OUTSIDE
        if flags:
            found[token["id"]] = flags
    return found


def _added_in_front(data: dict[str, Any], vocab_size: int) -> int | None:
    """The token that the post-processor puts before a text."""
    front = None
    for step in _steps(data.get("post_processor"), "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise _refuse(f"post-processor {step['type']}")
        template = [next(iter(item.items())) for item in step["single"]]
        kinds = [kind for kind, _ in template]
        if kinds == ["Sequence"]:
            continue
        ids = (
            []
            if kinds != ["SpecialToken", "Sequence"]
            else (step["special_tokens"][template[0][1]["id"]]["ids"])
        )
        if front is not None or len(ids) != 1:
            raise _refuse("a template other than one token before the text")
        front = int(ids[0])
        if front >= vocab_size:
            raise CheckpointError(
                f"tokenizer.json: post_processor: token {front} is outside the model's vocabulary of "
                f"{vocab_size}; the tokenizer does not belong to this model"
            )
    return front


def _normalizers(steps: list[dict[str, Any]]) -> list[str]:
    """The words of `squat.tokenizer.normalizers`."""
    words = []
    for step in steps:
        kind = step["type"]
        if kind in _NORMALIZERS:
            words.append(_NORMALIZERS[kind])
        elif kind == "Prepend" and step["prepend"]:
            words += ["prepend", step["prepend"]]
        elif kind == "Replace" and step["pattern"].get("String"):
            words += ["replace", step["pattern"]["String"], step["content"]]
        else:
            raise _refuse(f"normalizer {kind}{' of a pattern' if kind == 'Replace' else ''}")
        if max(map(len, words), default=0) > _LONGEST:
            raise _refuse(f"normalizer {kind} of more than {_LONGEST} characters")
    return words


def _byte_level(
    data: dict[str, Any], steps: list[dict[str, Any]], tokenizer: GgmlTokenizer
) -> None:
    """Fill in what the pre-tokenizer of a byte-level BPE says."""
    name = split_name(steps, bool(data["model"].get("ignore_merges")))
    if name is None:
        raise _refuse("a byte-level BPE that splits a text by another pattern or ignores merges")
    tokenizer.pre = name
    if steps[-1]["add_prefix_space"]:
        # What is split before has the space in front of every piece, which no reader does.
        if len(steps) > 1:
            raise _refuse("splitting a text before a space is put in front")
        tokenizer.prefix = "always"
    if [step["type"] for step in _steps(data.get("decoder"), "decoders")] != ["ByteLevel"]:
        raise _refuse("a byte-level BPE with another decoder")


def _sentencepiece(
    data: dict[str, Any], steps: list[dict[str, Any]], tokenizer: GgmlTokenizer
) -> None:
    """Fill in what the pre-tokenizer of a SentencePiece model says about spaces."""
    words = tokenizer.normalizers
    if [step["type"] for step in steps] == ["Metaspace"]:
        space = steps[0]
        if space["replacement"] != SPACE or space.get("split", True):
            raise _refuse("a Metaspace that splits words")
        scheme = space.get("prepend_scheme", "always")
        tokenizer.prefix = None if scheme == "never" else scheme
        words += _SPACES
    # Gemma's splits at spaces, of which its normalizer leaves none.
    elif words[-3:] != _SPACES or any(step.get("pattern") != {"String": " "} for step in steps):
        raise _refuse("a SentencePiece model with its pre-tokenizer and normalizer")
    decoder = [_without_type(step) for step in _steps(data.get("decoder"), "decoders")]
    strip = [("Strip", {"content": " ", "start": 1, "stop": 0})]
    expected = [
        ("Replace", {"pattern": {"String": SPACE}, "content": " "}),
        ("ByteFallback", {}),
        ("Fuse", {}),
        *(strip if tokenizer.add_space_prefix else []),
    ]
    if decoder != expected:
        raise _refuse("a SentencePiece model with its decoder")


def _unigram(model: dict[str, Any]) -> dict[str, Any]:
    """A Unigram model with the fields of a BPE without merges."""
    texts = [text for text, _ in model["vocab"]]
    if model.get("unk_id") is None:
        raise _refuse("a Unigram model without an unknown token")
    if len(set(texts)) < len(texts):
        raise _refuse("a Unigram model with a token twice")
    return {
        **model,
        "vocab": {text: index for index, text in enumerate(texts)},
        "merges": [],
        "unk_token": texts[model["unk_id"]],
        "fuse_unk": True,
    }


def _without_type(step: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return step["type"], {key: value for key, value in step.items() if key != "type"}


def _check_model(model: dict[str, Any], merges: list[tuple[str, ...]], byte_level: bool) -> None:
    """Refuse what a BPE may have that no reader knows."""
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refuse(f"a BPE with {name}")
    if any(" " in side for pair in merges for side in pair):
        raise _refuse("a BPE with a space in its merges")
    # Readers have one unknown token for a run of them; with every byte in the vocabulary there is none.
    every_byte = ByteLevel.alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    complete = all(byte in model["vocab"] for byte in every_byte)
    if not complete and model.get("unk_token") is not None and not model.get("fuse_unk"):
        raise _refuse("a BPE that does not fuse unknown tokens")


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
    if kind not in ("BPE", "Unigram"):
        raise _refuse(f"a {kind} model")
    pre_tokenizers = _steps(data.get("pre_tokenizer"), "pretokenizers")
    byte_level = bool(pre_tokenizers) and pre_tokenizers[-1]["type"] == "ByteLevel"
    if kind == "Unigram":
        if byte_level:
            raise _refuse("a byte-level Unigram model")
        scores = [float(score) for _, score in model["vocab"]]
        data["model"] = model = _unigram(model)
    elif not byte_level and not model.get("byte_fallback"):
        raise _refuse("a BPE without byte fallback")
    tokens, types = _vocabulary(data, vocab_size, not byte_level)
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    _check_model(model, pairs, byte_level)
    tokenizer = GgmlTokenizer(
        model="t5" if kind == "Unigram" else "gpt2" if byte_level else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in pairs],
        normalizers=_normalizers(_steps(data.get("normalizer"), "normalizers")),
        flags=_flags(data),
        bos=_added_in_front(data, vocab_size),
        unknown=model["vocab"].get(model.get("unk_token")),
    )
    if byte_level:
        _byte_level(data, pre_tokenizers, tokenizer)
        return tokenizer
    _sentencepiece(data, pre_tokenizers, tokenizer)
    if kind == "Unigram":
        tokenizer.scores = scores + [0.0] * (vocab_size - len(scores))
        return tokenizer
    rank: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        rank.setdefault("".join(pair), index)
    tokenizer.scores = [-float(rank[t]) if t in rank else 0.0 for t in tokens]
    return tokenizer
