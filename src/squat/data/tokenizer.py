"""Byte-level BPE, as the paper's models use it, and the check that a tokenizer fits a model.

NFKC, a space before the first word, every byte in the alphabet (so nothing is ever unknown), and
three special tokens: <pad> = 0, <s> = 1, </s> = 2. It puts <s> in front of a text, as every line of training
text has it.
"""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from squat.errors import DataError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = [PAD, BOS, EOS]


def train_tokenizer(
    lines: Iterable[str], vocab_size: int = 16_000, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on lines of text, as the paper's models have.

    Args:
        lines: the training text; read once, never held in memory.
        vocab_size: entries including the 3 special tokens and the 256 bytes. A small text may
            yield fewer.
        min_frequency: a pair of tokens seen less often is never merged.

    Raises:
        DataError: no text, or a vocabulary too small to hold every byte.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise DataError(
            f"tokenizer: vocab_size {vocab_size} is below {smallest} (bytes + specials)"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_not_empty(lines), trainer)
    return wrap_tokenizer(tokenizer)


def _not_empty(lines: Iterable[str]) -> Iterator[str]:
    empty = True
    for line in lines:
        empty = False
        yield line
    if empty:
        raise DataError("tokenizer: no text to train on; the corpus is empty")


def wrap_tokenizer(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """A `tokenizers` tokenizer with the names of its special tokens, as transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def check_same_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerFast, expected: PreTrainedTokenizerFast
) -> None:
    """Refuse a teacher whose token ids mean other tokens than the student's.

    Raises:
        DataError: the first token that differs.
    """
    theirs, ours = tokenizer.get_vocab(), expected.get_vocab()
    different = sorted(theirs.items() ^ ours.items(), key=lambda item: item[1])
    if different:
        token, _ = different[0]
        raise DataError(
            f"{name}: another tokenizer than the student's: token {token!r} has id {theirs.get(token)} "
            f"there and {ours.get(token)} here; a teacher must read the same tokens"
        )


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that every line of training text, and every text that is scored, begins with.

    It is bos, or eos where a tokenizer has no bos, as in lm-evaluation-harness: also where the tokenizer puts
    nothing in front of a text, something has to stand between two lines, and before a first word that is to
    be predicted.
    """
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def id_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; more than there are tokens if some ids are not used."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int | None = None) -> None:
    """Refuse a tokenizer that a model with `vocab_size` embeddings cannot be fed from.

    Raises:
        DataError: a token id beyond the model's vocabulary, or no token to start a text with.
    """
    name = tokenizer.name_or_path or "tokenizer"
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"{name}: token {token!r} has id {largest}, but the model's vocab_size is "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )
    if first_token(tokenizer) is None:
        raise DataError(
            f"{name}: neither bos_token nor eos_token is set, and every line of a corpus has to start with "
            "one; set one in tokenizer_config.json"
        )
