"""Text in, token windows out: corpora, tokenizers, packed datasets, data-free and built-in text."""

from squat.data.cleaning import clean
from squat.data.corpus import corpus_files, read_corpus
from squat.data.generated import generate_tokens
from squat.data.grammar import generate_text, minimal_pairs, write_corpus
from squat.data.packed import PackedDataset, evaluation_windows, tokenize_corpus
from squat.data.tokenizer import check_tokenizer, train_tokenizer, wrap_tokenizer

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
