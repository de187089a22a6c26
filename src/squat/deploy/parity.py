"""Is what was trained what runs? A checkpoint and its .gguf file side by side, on text.

Joint by joint (docs/design.md): the codes in the file against the codes of the checkpoint, bit for bit; the
tokens that both make of a text, and what ends an answer; then the engine's logits against those of the
PyTorch model in eval mode. Integers agree exactly; what is left are last bits of norms, softmax and SiLU,
which now and then push a value over a rounding boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.deploy.export import describe
from squat.deploy.gguf import GgufModel, read_codes
from squat.engine import Engine
from squat.errors import CheckpointError
from squat.special_tokens import end_tokens
from squat.terminal import track

TOP1 = 0.999
"""The least share of positions whose most probable token must be the same."""
KL = 1e-4
"""The largest mean KL divergence, in nats."""
TEXTS = 1000
"""Lines of a corpus that are tokenized by both."""


@dataclass(frozen=True)
class Parity:
    """How a file compares with its checkpoint.

    codes, differing: how many integer codes there are, and how many of them differ.
    texts, misread: how many texts there are, and how many of them the two tokenize differently.
    ends: whether the same tokens end an answer.
    positions: how many were compared; top1: share with the same most probable token; kl: mean
    KL(checkpoint || engine) in nats; largest: the largest difference of a logit.
    chunked: whether prefill in pieces of 1, 7 and 32 gives the same logits, bit for bit.
    """

    codes: int
    differing: int
    texts: int
    misread: int
    ends: bool
    positions: int
    top1: float
    kl: float
    largest: float
    chunked: bool

    @property
    def holds(self) -> bool:
        """Whether every joint holds."""
        same_text = self.misread == 0 and self.ends
        return (
            self.differing == 0
            and same_text
            and self.top1 >= TOP1
            and self.kl < KL
            and self.chunked
        )


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    file: str,
    windows: Sequence[Sequence[int]],
    texts: Sequence[str] = (),
    described: GgufModel | None = None,
) -> Parity:
    """Compare a checkpoint with its file.

    Args:
        model: the quantized model, in eval mode.
        tokenizer: its tokenizer.
        file: the .gguf file.
        windows: token ids, each at most the context long.
        texts: to be tokenized by both, with what stands in front of a text.
        described: what `describe` says of the checkpoint, where it has been asked already.

    Raises:
        CheckpointError: the file holds other tensors than the checkpoint.
        EngineError: the file cannot be loaded.
    """
    described = described or describe(model, tokenizer, file)
    different = different_tensors(described, file)
    codes = sum(matrix.codes.size for matrix in described.matrices.values())
    engine = Engine(file)
    misread = sum(tokenizer(text)["input_ids"] != engine.tokenize(text) for text in texts)
    ends = set(end_tokens(model, tokenizer)) == set(engine.info.eos_tokens)
    same, kl, largest, positions, chunked = 0, 0.0, 0.0, 0, True
    with track(windows, "comparing logits") as steps:
        for window in steps:
            with torch.no_grad():
                expected = model(torch.tensor([list(window)])).logits[0].double().log_softmax(-1)
            logits = engine.logits(window)
            got = torch.from_numpy(logits).double().log_softmax(-1)
            same += int((expected.argmax(-1) == got.argmax(-1)).sum())
            kl += float((expected.exp() * (expected - got)).sum())
            largest = max(largest, float((expected - got).abs().max()))
            positions += len(window)
            chunked &= all(_in_chunks(engine, window, size, logits) for size in (1, 7, 32))
    return Parity(
        codes,
        sum(different.values()),
        len(texts),
        misread,
        ends,
        positions,
        same / positions,
        kl / positions,
        largest,
        chunked,
    )


def parity_table(parity: Parity) -> Table:
    """One row a joint: what was found, and what has to hold."""
    table = Table(title="Parity of checkpoint and file")
    for heading in ("", "found", "must be", ""):
        table.add_column(heading)

    def row(name: str, found: str, bar: str, holds: bool) -> None:
        table.add_row(name, found, bar, Text("yes", "green") if holds else Text("NO", "red"))

    row("codes that differ", f"{parity.differing} of {parity.codes:,}", "0", not parity.differing)
    misread = f"{parity.misread} of {parity.texts:,}"
    row("texts with other tokens", misread, "0", not parity.misread)
    row("ends of an answer", "equal" if parity.ends else "different", "equal", parity.ends)
    row("same top token", f"{100 * parity.top1:.3f} %", "≥ 99.9 %", parity.top1 >= TOP1)
    row("mean KL, nats", f"{parity.kl:.2e}", "< 1e-4", parity.kl < KL)
    row("chunks of 1, 7, 32", "equal" if parity.chunked else "different", "equal", parity.chunked)
    table.caption = f"{parity.positions:,} positions; largest difference {parity.largest:.3g} nats"
    return table


def different_tensors(described: GgufModel, file: str) -> dict[str, int]:
    """Of a file's tensors the names of those with other codes or steps than described, and how many."""
    expected, found = described.matrices, read_codes(file)
    if expected.keys() != found.keys():
        name = min(expected.keys() ^ found.keys())
        raise CheckpointError(f"{file}: tensor {name} is not in both; export the checkpoint again")
    different = {}
    for name, matrix in expected.items():
        count = matrix.codes.size
        if found[name].codes.shape == matrix.codes.shape:
            other_step = (found[name].steps != matrix.steps)[:, None]
            count = int(((found[name].codes != matrix.codes) | other_step).sum())
        if count:
            different[name] = count
    return different


def _in_chunks(engine: Engine, window: Sequence[int], size: int, whole: np.ndarray) -> bool:
    pieces = engine.logits_in_chunks(window, size)
    return bool(np.array_equal(np.concatenate(list(pieces)), whole))
