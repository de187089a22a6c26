"""A corpus as one long row of token ids on disk, and windows cut from it.

Text is tokenized once: every cleaned line, preceded by the tokenizer's first token, in the order of
the files, into a flat binary file of uint16 (uint32 for large vocabularies) that is memory-mapped
afterwards, so the size of a corpus is bounded by the disk. The file's name is a digest of all that
determines its content, and it gets that name only when it is complete.

Training order is a pure function of (seed, index): resuming, workers and distributed training need
no state. Each epoch cuts the row into windows from a new random offset and shuffles them.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from squat.data import cleaning, corpus
from squat.data.cache import cache_folder
from squat.data.corpus import FIELD, corpus_files, read_corpus
from squat.data.files import once, writing
from squat.data.tokenizer import check_tokenizer, first_token, id_limit
from squat.errors import DataError
from squat.terminal import progress

Tokens = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids in one dimension, uint16 or uint32; usually memory-mapped."""

_BATCH_LINES = 4096

_TOKEN_FILES = {".uint16": np.uint16, ".uint32": np.uint32}


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def tokenize_corpus(
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | Path | None = None,
    by_source: bool = True,
    field: str = FIELD,
) -> Tokens:
    """The token ids of a corpus, memory-mapped, each line preceded by the tokenizer's first token.

    The first call tokenizes and leaves a file in `cache`; later ones find it, as long as the
    tokenizer, the cleaning rules and the files' names, sizes and modification times are the same.

    Args:
        path: a folder of text files or one file (see `read_corpus`).
        tokenizer: any fast tokenizer with a bos or an eos token.
        cache: a folder, made if missing; by default that of `squat.data.cache`.
        by_source: as in `read_corpus`.
        field: as in `read_corpus`.

    Returns:
        One dimension, uint16 or uint32.

    Raises:
        DataError: nothing to read, unreadable, no first token, or the disk is full.
    """
    check_tokenizer(tokenizer)
    dtype = token_dtype(id_limit(tokenizer))
    key = _corpus_key(path, tokenizer, by_source, field)
    file = cache_folder(cache) / f"text-{key}.{dtype.__name__}"
    with once(file) as missing:
        if missing:
            _tokenize(path, tokenizer, by_source, field, file)
    return np.memmap(file, dtype=dtype, mode="r")


def read_tokens(path: str | Path, vocab_size: int) -> Tokens:
    """A file of token ids, such as `squat tokenize` writes, memory-mapped.

    Args:
        path: its suffix, .uint16 or .uint32, is the type of the ids.
        vocab_size: that of the model; every id must be below it.

    Raises:
        DataError: the file cannot be read, or holds other tokens.
    """
    dtype = _TOKEN_FILES[Path(path).suffix]
    try:
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no file of {dtype.__name__} token ids ({error})") from None
    if (largest := int(tokens.max())) >= vocab_size:
        raise DataError(
            f"{path}: holds token id {largest}, but the model's vocab_size is {vocab_size}; tokenize the "
            "text with the model's own tokenizer"
        )
    return tokens


def is_token_file(path: str | Path) -> bool:
    """Whether a path names a file of token ids, by its suffix."""
    return Path(path).suffix in _TOKEN_FILES


def _tokenize(
    path: str | Path, tokenizer: PreTrainedTokenizerFast, by_source: bool, field: str, file: Path
) -> None:
    read = 0

    def count(size: int) -> None:
        nonlocal read
        read += size

    size = sum(entry.stat().st_size for entry in corpus_files(path))
    with progress(f"tokenizing {path}") as show, writing(file) as out:
        for ids in encode_lines(read_corpus(path, by_source, field, count), tokenizer):
            out.write(ids.tobytes())
            show(read, size)


def encode_lines(lines: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """Token ids of lines, each behind the first token, in batches that the tokenizer runs in parallel."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<s>" in a text is three characters, not a token
    dtype = token_dtype(id_limit(tokenizer))
    first = first_token(tokenizer)
    start = [] if first is None else [first]
    while batch := list(islice(lines, _BATCH_LINES)):
        encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
        yield np.fromiter(chain.from_iterable(start + line.ids for line in encoded), dtype)


def _corpus_key(
    path: str | Path, tokenizer: PreTrainedTokenizerFast, by_source: bool, field: str
) -> str:
    files = [(file.name, file.stat()) for file in corpus_files(path)]
    rules = [inspect.getsource(module) for module in (cleaning, corpus)]
    return digest(
        tokenizer.backend_tokenizer.to_str(),
        first_token(tokenizer),
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files],
        rules,
        by_source,
        field,
    )


def digest(*parts: object) -> str:
    """A short name for everything that determines the content of a cache file."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Training windows whose order is a pure function of (seed, index).

    Sample i belongs to epoch `i // windows_per_epoch`. Each epoch starts at its own random offset
    below `sequence_length` ("random chunk offset each epoch", the authors' recipe), cuts the row
    into adjacent windows and visits them in its own random order. Within an epoch no token is seen
    twice, and only less than two windows' worth at the ends is left out. Read it in order
    (a sequential sampler): it is shuffled already.

    Args:
        tokens: one dimension of token ids.
        sequence_length: tokens per sample.
        num_samples: length of the dataset; any number of epochs, whole or not.
        seed: of the offsets and the order.
        same_windows: cut the same windows in every epoch, from offset 0; a sample has the number of its
            window beside its tokens (`window`), whatever the seed.

    Raises:
        DataError: fewer tokens than one window.
    """

    def __init__(
        self,
        tokens: Tokens,
        sequence_length: int,
        num_samples: int,
        seed: int,
        same_windows: bool = False,
    ) -> None:
        check_length(tokens, sequence_length)
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.num_samples = num_samples
        self.seed = seed
        self.same_windows = same_windows
        # Windows that fit whatever the offset, so that all epochs are equally long.
        self.windows_per_epoch = max(1, (len(tokens) - sequence_length + 1) // sequence_length)
        self._epoch = -1

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        epoch, position = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            self._plan(epoch)
        window = int(self._order[position])
        start = self._offset + window * self.sequence_length
        found = sample(self.tokens[start : start + self.sequence_length])
        return {**found, "window": torch.tensor(window)} if self.same_windows else found

    def _plan(self, epoch: int) -> None:
        random = np.random.default_rng((self.seed, epoch))
        slack = len(self.tokens) - self.windows_per_epoch * self.sequence_length
        offset = int(random.integers(min(self.sequence_length, slack + 1)))
        self._offset = 0 if self.same_windows else offset
        self._order = random.permutation(self.windows_per_epoch)
        self._epoch = epoch


def evaluation_windows(tokens: Tokens, sequence_length: int) -> Dataset[dict[str, torch.Tensor]]:
    """All whole windows of a corpus, in file order, without overlap: for perplexity.

    Raises:
        DataError: fewer tokens than one window.
    """
    check_length(tokens, sequence_length)
    whole = len(tokens) // sequence_length
    return _Windows(tokens[: whole * sequence_length].reshape(whole, sequence_length))


class _Windows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, windows: Tokens) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return sample(self.windows[index])


def sample(window: Tokens) -> dict[str, torch.Tensor]:
    """A window as a causal language model takes it; transformers shifts the labels itself."""
    ids = torch.from_numpy(window.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def check_length(tokens: Tokens, sequence_length: int) -> None:
    """Refuse a corpus that does not fill a single window."""
    if len(tokens) < sequence_length:
        raise DataError(
            f"corpus: {len(tokens)} tokens do not fill one window of sequence_length "
            f"{sequence_length}; give more text or a shorter sequence_length"
        )
