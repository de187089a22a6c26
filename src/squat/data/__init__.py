"""Text in, token windows out: corpora, tokenizers, packed datasets, data-free and built-in text.

A name loads its module, and with it torch or transformers where that needs them, when it is touched: writing
files and showing progress need neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "PackedDataset": "packed",
    "check_tokenizer": "tokenizer",
    "clean": "cleaning",
    "corpus_files": "corpus",
    "evaluation_windows": "packed",
    "generate_text": "grammar",
    "generate_tokens": "generated",
    "minimal_pairs": "grammar",
    "read_corpus": "corpus",
    "tokenize_corpus": "packed",
    "train_tokenizer": "tokenizer",
    "wrap_tokenizer": "tokenizer",
    "write_corpus": "grammar",
}

__all__ = [
    "PackedDataset",
    "check_tokenizer",
    "clean",
    "corpus_files",
    "evaluation_windows",
    "generate_text",
    "generate_tokens",
    "minimal_pairs",
    "read_corpus",
    "tokenize_corpus",
    "train_tokenizer",
    "wrap_tokenizer",
    "write_corpus",
]

if TYPE_CHECKING:
    from squat.data.cleaning import clean
    from squat.data.corpus import corpus_files, read_corpus
    from squat.data.generated import generate_tokens
    from squat.data.grammar import generate_text, minimal_pairs, write_corpus
    from squat.data.packed import PackedDataset, evaluation_windows, tokenize_corpus
    from squat.data.tokenizer import check_tokenizer, train_tokenizer, wrap_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'squat.data' has no attribute {name!r}")
    return getattr(import_module(f"squat.data.{_HOMES[name]}"), name)
