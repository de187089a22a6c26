"""The engine's own tokenizer, which squat-run uses too, against the tokenizers library."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine_models import random_model
from squat.deploy.gguf import write_gguf
from squat.deploy.tokenizer import TokenType, ggml_tokenizer
from squat.engine import Engine
from squat.errors import CheckpointError, EngineError
from tokenizer_kinds import KINDS, SENTENCES, byte_level_bpe, gemma

ALPHABET = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789 \t\n\r'.,;:!?-_()<>/\\\"#&%▁"
    "éüñßøæœçåÄÖÜıİſƒǅǆȩ\u0301\u0308\u0323\u0327\u0345ΩπάΐЖйʼאשׁערبيةदेวไม"
    "\u00a0\u2002\u2009\u3000\u200b\u200d\u2028\ufeff…“”‘’—–€™½²³①Ⅷﬁﬀ٣１\x00\x85"
    "가각힣ᄀ\u1161\u11a8日本語ｱﾞＡ１😀👍𝕏"
)
SNIPPETS = (
    *(
        "'s",
        "'LL",
        "'ſ",
        "  ",
        "\r\n",
        "\n\n",
        " \n",
        "123",
        "12345",
        " zebra",
        "été",
        "猫",
        "the ",
        " the",
    ),
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<s>",
        "</s>",
        "<unk>",
        "<think>",
        "<unused0>",
        "▁▁",
        "<0x41>",
    ),
    *("<T5>", "t4", "T12", "<t9>", "<T", "word", "é", "  <", "ab", "ＡＢ", "X--", "ss", "<|late|>"),
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    st.lists(st.one_of(st.sampled_from(ALPHABET), st.sampled_from(SNIPPETS)), max_size=20).map(
        "".join
    ),
)


def engine_of(folder: Path, tokenizer: str) -> Engine:
    """An engine whose file has a tokenizer.json, and an embedding with some rows more."""
    path = folder / "model.gguf"
    write_gguf(path, random_model(hidden=32, layers=1, tokenizer_json=tokenizer))
    return Engine(path, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Tokenizer]:
    tokenizer = KINDS[request.param]()
    return engine_of(tmp_path_factory.mktemp("tokenizer"), tokenizer.to_str()), tokenizer


def assert_same_tokens(engine: Engine, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert engine.tokenize(text) == ids
    assert engine.detokenize(ids) == tokenizer.decode(ids)


@settings(max_examples=250)
@given(text=TEXTS)
def test_any_text_has_the_librarys_tokens(kind: tuple[Engine, Tokenizer], text: str) -> None:
    assert_same_tokens(*kind, text)


@pytest.mark.parametrize("name", SENTENCES)
def test_scripts_emoji_code_and_control_characters(
    kind: tuple[Engine, Tokenizer], name: str
) -> None:
    text = SENTENCES[name]
    for variant in (text, f" {text}", f"{text}\r\n{text}  ", text.replace(" ", "\n\n"), text[::-1]):
        assert_same_tokens(*kind, variant)


@pytest.mark.slow
def test_every_character(kind: tuple[Engine, Tokenizer]) -> None:
    points = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for begin in range(0, len(points), 5000):
        text = "".join(f"a{chr(c)}1{chr(c)} {chr(c)}\u0301" for c in points[begin : begin + 5000])
        assert kind[0].tokenize(text) == kind[1].encode(text).ids, hex(begin)


def test_the_kinds_differ() -> None:
    """So that the tests above can fail."""
    text = " Don't  É12345é\n\n <T5>  x<s>é"
    found = {tuple(make().encode(text).tokens) for make in KINDS.values()}
    assert len(found) == len(KINDS) - 1  # "holes" is "smollm" with other ids


@settings(max_examples=200)
@given(text=TEXTS, cut=st.integers(0, 20))
def test_a_stream_is_the_text_of_all_tokens_character_by_character(
    kind: tuple[Engine, Tokenizer], text: str, cut: int
) -> None:
    from squat.text_stream import TextStream

    engine, tokenizer = kind
    ids = tokenizer.encode(text).ids
    prompt, answer = ids[:cut], ids[cut:]
    stream = TextStream(engine._native, prompt)
    pieces = [stream.push(token) for token in answer] + [stream.rest()]
    whole, before = engine.detokenize(ids), engine.detokenize(prompt)
    assert whole.endswith("".join(pieces))
    if not before.endswith("\ufffd"):  # the prompt does not end inside of a character
        assert before + "".join(pieces) == whole


def test_a_stream_of_bytes_comes_out_as_characters(tmp_path: Path) -> None:
    from squat.text_stream import TextStream

    text = "日本語の本 😀!"
    tokenizer = KINDS["llama-2"]()
    engine = engine_of(tmp_path, tokenizer.to_str())
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > 3 * 6  # bytes, most of them
    stream = TextStream(engine._native, [1])
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert engine.detokenize(ids) == text
    broken = [stream.push(token) for token in (ids[1], ids[-1])]  # a byte of three
    assert broken == ["", "\ufffd!"]


def test_rows_without_a_token_have_no_text(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, KINDS["holes"]().to_str())
    unused = set(range(engine.info.vocab_size)) - set(engine.tokenizer.get_vocab().values())
    assert len(unused) > 20
    assert engine.detokenize(sorted(unused)) == ""
    assert engine.detokenize(engine.tokenize("[PAD610]")) == "[PAD610]"


def test_a_text_that_is_no_unicode(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, byte_level_bpe().to_str())
    with pytest.raises(EngineError, match="text: "):
        engine.tokenize("a\udcffb")


@pytest.mark.parametrize("name", ["babylm-6m", "stories260k"])
def test_real_tokenizers_on_real_text(tmp_path: Path, name: str) -> None:
    if "SQUAT_DATA" not in os.environ:
        pytest.skip("needs real data: SQUAT_DATA is not set")
    data = Path(os.environ["SQUAT_DATA"])
    text = (data.parent / "models" / name / "tokenizer.json").read_text(encoding="utf-8")
    engine, tokenizer = engine_of(tmp_path, text), Tokenizer.from_str(text)
    files = sorted((data / "babylm" / "dev").glob("*.dev"))
    assert files
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        for begin in range(0, len(lines), 500):
            part = "\n".join(lines[begin : begin + 500])
            assert engine.tokenize(part) == tokenizer.encode(part).ids, f"{file.name}, line {begin}"


@pytest.mark.slow
def test_unicode_tables_are_what_their_script_writes() -> None:
    folder = Path(__file__).parent.parent / "native" / "text"
    written = (folder / "unicode_tables.inc").read_text(encoding="ascii")
    if f"tokenizers {tokenizers.__version__}." not in written:
        pytest.skip("this is another version of the tokenizers library")
    assert runpy.run_path(str(folder / "unicode_tables.py"))["tables"]() == written


# --- What stands in the file


PLAIN = ("gpt-2", "smollm", "llama-2", "llama-3", "olmo-2", "holes", "few bytes", "few byte tokens")
"""The kinds that a reader of the `tokenizer.ggml.*` keys knows as they are."""


@pytest.mark.parametrize("name", KINDS)
def test_a_file_names_the_keys_that_an_older_reader_would_ignore(name: str, tmp_path: Path) -> None:
    engine = engine_of(tmp_path, KINDS[name]().to_str())
    features = GGUFReader(tmp_path / "model.gguf").fields.get("squat.features")
    assert (None if features is None else features.contents()) == (
        None if name in PLAIN else ["tokenizer"]
    )
    ignored = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "older.gguf").write_bytes(ignored.replace(b"squat.tokenizer.", b"other.tokenizer."))
    if name.startswith("unigram"):  # of a model that older readers do not know
        with pytest.raises(EngineError, match=r"squat\.tokenizer\.scores"):
            Engine(tmp_path / "older.gguf").tokenize("a")
        return
    older = Engine(tmp_path / "older.gguf", threads=1)
    texts = [*SENTENCES.values(), *(f"{s}{text} " for s in SNIPPETS for text in ("", "x A", s))]
    same = [older.tokenize(text) == engine.tokenize(text) for text in texts]
    # What Gemma's flags say, that the merges do not know an added token, changes nothing there.
    assert all(same) == (name in (*PLAIN, "gemma"))


def test_keys_of_the_papers_tokenizer() -> None:
    made = ggml_tokenizer(KINDS["paper"]().to_str(), 310)
    assert (made.model, made.pre, made.normalizers, made.prefix) == (
        "gpt2",
        "gpt-2",
        ["nfkc"],
        "always",
    )
    assert made.add_space_prefix
    assert made.bos is None
    assert len(made.tokens) == len(made.types) == 310
    assert made.tokens[1] == "<s>"
    assert made.types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert (made.tokens[309], made.types[309]) == ("[PAD309]", TokenType.UNUSED)
    assert made.flags == {}


def test_keys_of_a_sentencepiece_tokenizer() -> None:
    text = KINDS["llama-2"]().to_str()
    made = ggml_tokenizer(text, len(json.loads(text)["model"]["vocab"]))
    assert (made.model, made.bos, made.unknown) == ("llama", 1, 0)
    assert (made.normalizers, made.prefix) == (["prepend", "▁", "replace", " ", "▁"], None)
    assert made.add_space_prefix
    assert made.types[:4] == [2, 3, 3, TokenType.BYTE]
    scores = dict(zip(made.tokens, made.scores, strict=True))
    assert scores["he"] > scores["▁t"] > scores["▁the"]
    assert not ggml_tokenizer(gemma().to_str(), 400).add_space_prefix


@pytest.mark.parametrize(
    ("name", "pre", "bos"),
    [
        ("gpt-2", "gpt-2", None),
        ("gpt-neox", "gpt-2", None),
        ("smollm", "smollm", None),
        ("llama-3", "llama-bpe", 0),
        ("olmo-2", "dbrx", None),
        ("qwen2", "qwen2", None),
    ],
)
def test_splits_have_the_names_that_llama_cpp_gives_them(
    name: str, pre: str, bos: int | None
) -> None:
    made = ggml_tokenizer(KINDS[name]().to_str(), 800)
    assert (made.pre, made.bos) == (pre, bos)


def test_added_tokens_have_their_flags_in_the_file() -> None:
    text = KINDS["flags"]().to_str()
    made, added = ggml_tokenizer(text, 800), json.loads(text)["added_tokens"]
    vocabulary = json.loads(text)["model"]["vocab"]
    assert len(made.flags) > 15
    for token in added:
        flags = made.flags.get(token["id"], 0)
        names = ("single_word", "lstrip", "rstrip", "normalized")
        assert [token[name] for name in names] == [bool(flags & 1 << i) for i in range(4)]
        assert bool(flags & 16) == (token["content"] not in vocabulary)


def _with(**parts: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(parts)


def _model_with(**parts: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["model"].update(parts)


BYTE_LEVEL_REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a WordPiece model": _model_with(type="WordPiece"),
    "a byte-level Unigram model": _model_with(type="Unigram"),
    "splits a text by another pattern": lambda data: data["pre_tokenizer"]["pretokenizers"][
        0
    ].update(use_regex=False),
    "or ignores merges": _model_with(ignore_merges=True),
    "normalizer StripAccents": _with(normalizer={"type": "StripAccents"}),
    "normalizer Replace of a pattern": _with(
        normalizer={"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}
    ),
    "normalizer Prepend of more than 64 characters": _with(
        normalizer={"type": "Prepend", "prepend": "x" * 65}
    ),
    "post-processor RobertaProcessing": _with(post_processor={"type": "RobertaProcessing"}),
    "a byte-level BPE with another decoder": _with(decoder=None),
    "a BPE with end_of_word_suffix": _model_with(end_of_word_suffix="</w>"),
    "a BPE with continuing_subword_prefix": _model_with(continuing_subword_prefix="##"),
    "a BPE with dropout": _model_with(dropout=0.1),
    "a BPE with a space in its merges": _model_with(merges=[["a b", "c"]]),
    "a BPE that does not fuse unknown tokens": lambda data: (
        data["model"].update(unk_token="<|endoftext|>"),
        data["model"]["vocab"].pop("Ġ"),
    ),
    "added_tokens: '<|endoftext|>' has id 5, but 0": lambda data: data["added_tokens"][0].update(
        id=5
    ),
    "does not belong to this model": lambda data: data["model"]["vocab"].update(late=1000),
}


@pytest.mark.parametrize("message", BYTE_LEVEL_REFUSED)
def test_a_byte_level_tokenizer_that_cannot_be_expressed(message: str) -> None:
    data = json.loads(byte_level_bpe().to_str())
    BYTE_LEVEL_REFUSED[message](data)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        ggml_tokenizer(json.dumps(data), 800)


UNIGRAM_REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a Unigram model without an unknown token": _model_with(unk_id=None),
    "a Unigram model with a token twice": lambda data: data["model"]["vocab"].append(["▁", -1.0]),
    "normalizer Precompiled": _with(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
    "a SentencePiece model with its decoder": _with(decoder={"type": "Metaspace"}),
}


@pytest.mark.parametrize("message", UNIGRAM_REFUSED)
def test_a_unigram_tokenizer_that_cannot_be_expressed(message: str) -> None:
    data = json.loads(KINDS["unigram"]().to_str())
    UNIGRAM_REFUSED[message](data)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        ggml_tokenizer(json.dumps(data), 800)


SENTENCEPIECE_REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a BPE without byte fallback": _model_with(byte_fallback=False),
    "normalizer NFD": _with(normalizer={"type": "NFD"}),
    "with its pre-tokenizer and normalizer": _with(normalizer=None),
    "with its decoder": _with(decoder={"type": "ByteFallback"}),
    "a template other than one token before the text": lambda data: data["post_processor"][
        "single"
    ].append({"SpecialToken": {"id": "<s>", "type_id": 0}}),
    "a Metaspace that splits words": _with(
        normalizer=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
    ),
}


@pytest.mark.parametrize("message", SENTENCEPIECE_REFUSED)
def test_a_sentencepiece_tokenizer_that_cannot_be_expressed(message: str) -> None:
    data = json.loads(KINDS["llama-2"]().to_str())
    SENTENCEPIECE_REFUSED[message](data)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        ggml_tokenizer(json.dumps(data), 800)
