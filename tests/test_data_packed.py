"""Packed corpora: the file equals direct tokenization, and order is a function of (seed, index)."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from squat.data import (
    PackedDataset,
    evaluation_windows,
    generate_text,
    packed,
    read_corpus,
    tokenize_corpus,
    train_tokenizer,
)
from squat.errors import DataError

SHAPES = {
    "length": st.integers(1, 400),
    "sequence_length": st.integers(1, 40),
    "seed": st.integers(0, 2**32),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(generate_text(1000, seed=0), vocab_size=600)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n".join(generate_text(200, seed=ord(name[0]))))
    return folder


def row(length: int) -> np.ndarray:
    """Tokens that name their own position."""
    return np.arange(length, dtype=np.uint16)


def windows(dataset: PackedDataset, start: int, stop: int) -> list[list[int]]:
    return [dataset[i]["input_ids"].tolist() for i in range(start, stop)]


# --- the file ---


def test_the_file_equals_direct_tokenization(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokens = tokenize_corpus(corpus, tokenizer, tmp_path / "cache")
    direct = chain.from_iterable(tokenizer(line).input_ids for line in read_corpus(corpus))
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(direct)


@pytest.mark.skipif("SQUAT_DATA" not in os.environ, reason="SQUAT_DATA is not set")
def test_a_real_file_equals_direct_tokenization(tmp_path: Path) -> None:
    data = Path(os.environ["SQUAT_DATA"])
    tokenizer = AutoTokenizer.from_pretrained(data.parent / "models" / "babylm-6m")
    file = data / "babylm" / "dev" / "childes.dev"
    tokens = tokenize_corpus(file, tokenizer, tmp_path)
    direct = chain.from_iterable([1, *tokenizer(line).input_ids] for line in read_corpus(file))
    assert tokens.tolist() == list(direct)


def test_special_tokens_in_the_text_are_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("before </s> after <s>\n")
    tokens = tokenize_corpus(tmp_path, tokenizer, tmp_path / "cache")
    assert (tokens == 1).sum() == 1
    assert (tokens == 2).sum() == 0


def test_tokenizing_leaves_the_tokenizer_as_it_was(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    tokenize_corpus(corpus, tokenizer, tmp_path / "cache")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("<s>").input_ids == [1, 1]


def test_large_vocabularies_take_four_bytes() -> None:
    assert packed.token_dtype(65_536) is np.uint16
    assert packed.token_dtype(65_537) is np.uint32


def test_the_second_call_finds_the_file(
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = tokenize_corpus(corpus, tokenizer, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(packed, "encode_lines", lambda *_: pytest.fail("tokenized twice"))
        assert np.array_equal(tokenize_corpus(corpus, tokenizer, tmp_path / "cache"), first)
    other = train_tokenizer(generate_text(500, seed=9), vocab_size=400)
    assert not np.array_equal(tokenize_corpus(corpus, other, tmp_path / "cache"), first)
    os.utime(corpus / "a.txt", (1, 1))
    tokenize_corpus(corpus, tokenizer, tmp_path / "cache")
    (corpus / "b.txt").rename(corpus / "c.txt")
    tokenize_corpus(corpus, tokenizer, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("text-*"))) == 4


def test_two_at_a_time_tokenize_once(
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []
    encode_lines = packed.encode_lines

    def counted(*arguments: object) -> Iterator[np.ndarray]:
        runs.append(1)
        return encode_lines(*arguments)

    monkeypatch.setattr(packed, "encode_lines", counted)
    with ThreadPoolExecutor(2) as pool:
        tasks = [
            pool.submit(tokenize_corpus, corpus, tokenizer, tmp_path / "cache") for _ in range(2)
        ]
        first, second = (task.result() for task in tasks)
    assert np.array_equal(first, second)
    assert len(runs) == 1


def test_an_interrupted_run_leaves_no_file(
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> Iterator[np.ndarray]:
        yield row(3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packed, "encode_lines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(corpus, tokenizer, tmp_path / "cache")
    assert not [f for f in (tmp_path / "cache").iterdir() if f.suffix != ".lock"]
    assert len(tokenize_corpus(corpus, tokenizer, tmp_path / "cache")) > 3


def test_a_full_disk_is_one_line(
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> Iterator[np.ndarray]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(packed, "encode_lines", full)
    with pytest.raises(DataError, match=r"text-\w+\.uint16: cannot be written \(No space left"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "cache")


def test_a_cache_that_is_a_file(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "cache")


def test_a_corpus_without_text_says_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="no text in 1 file"):
        tokenize_corpus(tmp_path, tokenizer, tmp_path / "cache")


# --- the order ---


@given(**SHAPES, epoch=st.integers(0, 5))
def test_an_epoch_is_adjacent_windows_in_random_order(
    length: int, sequence_length: int, seed: int, epoch: int
) -> None:
    if length < sequence_length:
        return
    dataset = PackedDataset(row(length), sequence_length, num_samples=10_000, seed=seed)
    n = dataset.windows_per_epoch
    seen = sorted(chain.from_iterable(windows(dataset, epoch * n, (epoch + 1) * n)))
    # Nothing lost or seen twice between the first and the last token of the epoch ...
    assert seen == list(range(seen[0], seen[0] + n * sequence_length))
    # ... and less than two windows' worth left out at the ends.
    assert seen[0] < sequence_length
    assert length - len(seen) <= 2 * (sequence_length - 1)


@given(**SHAPES, indices=st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_a_sample_is_a_function_of_seed_and_index(
    length: int, sequence_length: int, seed: int, indices: list[int]
) -> None:
    if length < sequence_length:
        return
    once = PackedDataset(row(length), sequence_length, 1000, seed)
    in_order = {i: once[i]["input_ids"].tolist() for i in sorted(set(indices))}
    again = PackedDataset(row(length), sequence_length, 1000, seed)
    assert [again[i]["input_ids"].tolist() for i in indices] == [in_order[i] for i in indices]


@settings(max_examples=30)
@given(start=st.integers(0, 200), seed=st.integers(0, 99))
def test_resuming_anywhere_gives_the_same_samples(start: int, seed: int) -> None:
    whole = windows(PackedDataset(row(500), 16, 200, seed), 0, 200)
    assert windows(PackedDataset(row(500), 16, 200, seed), start, 200) == whole[start:]


def test_epochs_and_seeds_differ() -> None:
    dataset = PackedDataset(row(5000), 16, 10_000, seed=0)
    n = dataset.windows_per_epoch
    starts = {min(chain.from_iterable(windows(dataset, e * n, (e + 1) * n))) for e in range(8)}
    assert len(starts) > 2
    assert windows(dataset, 0, n) != windows(dataset, n, 2 * n)
    assert windows(dataset, 0, n) != windows(PackedDataset(row(5000), 16, 10_000, 1), 0, n)


def test_samples_are_what_a_language_model_takes() -> None:
    sample = PackedDataset(row(100), 10, 3, seed=0)[2]
    assert set(sample) == {"input_ids", "labels"}
    assert sample["input_ids"].dtype == torch.int64
    assert torch.equal(sample["input_ids"], sample["labels"])


def test_workers_see_the_same_samples() -> None:
    dataset = PackedDataset(row(300), 16, 60, seed=3)
    alone, shared = (
        [batch["input_ids"].tolist() for batch in DataLoader(dataset, batch_size=4, num_workers=n)]
        for n in (0, 2)
    )
    assert alone == shared


def test_the_end_is_the_end() -> None:
    dataset = PackedDataset(row(100), 10, 7, seed=0)
    assert len(dataset) == len(list(dataset)) == 7
    with pytest.raises(IndexError):
        dataset[7]


@given(length=st.integers(1, 300), sequence_length=st.integers(1, 40))
def test_evaluation_windows_are_the_text_in_order(length: int, sequence_length: int) -> None:
    if length < sequence_length:
        return
    dataset = evaluation_windows(row(length), sequence_length)
    seen = list(chain.from_iterable(sample["input_ids"].tolist() for sample in dataset))
    assert seen == list(range(length // sequence_length * sequence_length))


def test_fewer_tokens_than_a_window() -> None:
    message = "9 tokens do not fill one window of sequence_length 10"
    with pytest.raises(DataError, match=message):
        PackedDataset(row(9), 10, 5, seed=0)
    with pytest.raises(DataError, match=message):
        evaluation_windows(row(9), 10)
    assert len(PackedDataset(row(10), 10, 5, seed=0)) == 5
