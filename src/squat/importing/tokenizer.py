"""The tokenizer of a .gguf file, with the ids that llama.cpp gives a text.

The other direction, for our own files, is `squat.deploy.tokenizer`. Control tokens in a text are taken as
such, as llama.cpp does where it is told to parse them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from squat.deploy.splits import SPLITS, Split
from squat.deploy.tokenizer import SPACE, TokenType
from squat.errors import CheckpointError
from squat.importing.file import GgufFile

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}
"""What llama.cpp takes where the file of a SentencePiece vocabulary does not say."""


def special_ids(file: GgufFile) -> dict[str, int]:
    """The ids of bos, eos, unk and pad, as far as there are any.

    Raises:
        CheckpointError: an id that the vocabulary has not.
    """
    sentencepiece = file.get("tokenizer.ggml.model", str) == "llama"
    size = len(file.need("tokenizer.ggml.tokens", list))
    ids = {}
    for role, name in _ROLES.items():
        key = f"tokenizer.ggml.{name}_token_id"
        value = file.get(key, int)
        if value is None and sentencepiece:
            value = _SENTENCEPIECE_IDS.get(role)
        if value is None:
            continue
        if not 0 <= value < size:
            raise CheckpointError(
                f"{file.path}: key {key} is {value}, but there are {size} tokens; take another copy"
            )
        ids[role] = value
    return ids


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a .gguf file, with its chat template.

    Raises:
        CheckpointError: a tokenizer that is not complete, or of a kind that is not supported; with the key.
    """
    kind = file.need("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path}: key tokenizer.ggml.model is {kind!r}, which is not supported; gpt2 (byte-level "
            "BPE) and llama (SentencePiece) are"
        )
    tokens = _tokens(file)
    special = {role: tokens[index].text for role, index in special_ids(file).items()}
    if kind == "gpt2":
        split = _split(file)
        tokenizer, adds_bos = _byte_level(file, tokens, split), split.bos
    else:
        tokenizer, adds_bos = _sentencepiece(file, tokens, special), True
    _mark_whole(tokenizer, tokens)
    tokenizer.post_processor = _around(file, tokenizer, special, adds_bos)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=file.path,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": text for role, text in special.items()},
    )
    wrapped.chat_template = file.get("tokenizer.chat_template", str)
    return wrapped


@dataclass(frozen=True)
class _Token:
    text: str
    kind: int
    index: int


def _tokens(file: GgufFile) -> list[_Token]:
    """The vocabulary, whose texts are all different."""
    texts = file.need("tokenizer.ggml.tokens", list)
    kinds = _beside(file, "token_type", len(texts)) or [TokenType.NORMAL] * len(texts)
    rows = file.shape("token_embd.weight")[0]
    if len(texts) > rows:
        raise CheckpointError(
            f"{file.path}: {len(texts)} tokens, but tensor token_embd.weight has {rows} rows; take another "
            "copy, or convert the model again"
        )
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if first.setdefault(text, index) != index:
            raise CheckpointError(
                f"{file.path}: key tokenizer.ggml.tokens: tokens {first[text]} and {index} are both "
                f"{text!r}; convert the model again"
            )
    return [_Token(t, k, i) for i, (t, k) in enumerate(zip(texts, kinds, strict=True))]


def _beside(file: GgufFile, name: str, count: int) -> list[Any] | None:
    """A list with a value for each token, if the file has it."""
    values = file.get(f"tokenizer.ggml.{name}", list)
    if values is not None and len(values) != count:
        raise CheckpointError(
            f"{file.path}: key tokenizer.ggml.{name} has {len(values)} elements, expected {count}; take "
            "another copy, or convert the model again"
        )
    return values


def _ids(tokens: list[_Token]) -> dict[str, int]:
    """Without what stands for ids that no token has."""
    return {
        token.text: token.index
        for token in tokens
        if token.kind != TokenType.UNUSED or token.text != f"[PAD{token.index}]"
    }


def _split(file: GgufFile) -> Split:
    name = file.get("tokenizer.ggml.pre", str)
    if name not in SPLITS:
        raise CheckpointError(
            f"{file.path}: key tokenizer.ggml.pre is {name!r}: how this tokenizer splits a text is not known "
            f"here; known are {', '.join(SPLITS)}"
        )
    return SPLITS[name]


def _byte_level(file: GgufFile, tokens: list[_Token], split: Split) -> Tokenizer:
    merges = []
    for merge in file.need("tokenizer.ggml.merges", list):
        left, _, right = merge[1:].partition(
            " "
        )  # a first character that is a space is the token's
        merges.append((merge[:1] + left, right))
    try:
        model = BPE(vocab=_ids(tokens), merges=merges, ignore_merges=split.whole)
    except Exception as error:  # the library raises nothing more special
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"{file.path}: key tokenizer.ggml.merges: {cause}; take another copy, or convert the model again"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[_Token], special: dict[str, str]) -> Tokenizer:
    """llama.cpp merges whatever makes a token, the highest score first, and ignores the file's merges."""
    scores = _beside(file, "scores", len(tokens))
    if scores is None:
        raise CheckpointError(
            f"{file.path}: key tokenizer.ggml.scores is missing; convert the model again"
        )
    ids = _ids(tokens)
    pairs = [
        (scores[token.index], (token.text[:cut], token.text[cut:]))
        for token in tokens
        if token.kind == TokenType.NORMAL
        for cut in range(1, len(token.text))
        if token.text[:cut] in ids and token.text[cut:] in ids
    ]
    pairs.sort(key=lambda pair: -pair[0])
    merges = [pair for _, pair in pairs]
    model = BPE(
        vocab=ids, merges=merges, unk_token=special.get("unk"), fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool) is not False
    spaces = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _mark_whole(tokenizer: Tokenizer, tokens: list[_Token]) -> None:
    """The tokens that are taken out of a text before it is split."""

    def of(*kinds: TokenType, special: bool) -> list[AddedToken]:
        found = [token.text for token in tokens if token.kind in kinds]
        return [AddedToken(text, normalized=False, special=special) for text in found]

    tokenizer.add_special_tokens(of(TokenType.UNKNOWN, TokenType.CONTROL, special=True))
    tokenizer.add_tokens(of(TokenType.USER_DEFINED, special=False))


def _around(
    file: GgufFile, tokenizer: Tokenizer, special: dict[str, str], adds_bos: bool
) -> processors.PostProcessor:
    """What is put around a text; `adds_bos` where the file does not say."""
    around = {}
    for role, usual in (("bos", adds_bos), ("eos", False)):
        key = f"tokenizer.ggml.add_{role}_token"
        said = file.get(key, bool)
        if usual if said is None else said:
            if role not in special:
                raise CheckpointError(
                    f"{file.path}: a text has to have {role} around it (key {key}), but key "
                    f"tokenizer.ggml.{role}_token_id is missing; convert the model again"
                )
            around[role] = special[role]
    before, after = ([around[role]] if role in around else [] for role in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in {*around.values()}],
    )
