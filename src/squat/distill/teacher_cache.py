"""Teachers' answers on disk: each window of the text is shown to them once.

An answer is a distribution over the vocabulary for every token, too large to keep. At the loss's temperature
it is flat (of babylm-6m's, at temperature 2, the 64 most probable of 6,000 entries hold a quarter), so
keeping its head would change the loss beyond recognition. Kept is a sample: `draws` entries drawn from
the distribution, 2 bytes each. Their frequencies stand in for it:

    p(v) = how often v was drawn / draws

Cross-entropy is linear in p, and a frequency's expectation is the probability: the gradient of the
distillation loss is unbiased, with noise that averages out over tokens (Anshumann et al. 2025, arXiv
2503.16870). Its value is not: a sample has less entropy than the distribution, so that the KL stands too
high, by a constant that the student does not enter.

A file belongs to one set of teachers, one text, one length of windows, one temperature and one number of
draws, and is named by them all. It is filled by whatever run asks first, in any order and by several
processes, and stays for later epochs and later runs. Every window carries a checksum: one that a crash
left half written counts as missing, and is asked for again.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from squat.data.files import once, readable_errors
from squat.data.generated import weights_hash
from squat.data.packed import PackedDataset, digest, token_dtype
from squat.errors import DataError


class TeacherCache:
    """Answers of teachers to the windows of one text.

    Args:
        folder: where the file is, made if missing.
        teachers: whose averaged logits are kept.
        dataset: its windows, which must be the same in every epoch (`same_windows`).
        temperature: of the distillation loss.
        draws: how many entries are drawn from each distribution.

    Raises:
        DataError: the disk has no room for the file, or the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        teachers: Sequence[PreTrainedModel],
        dataset: PackedDataset,
        temperature: float,
        draws: int,
    ) -> None:
        vocabulary = teachers[0].config.get_text_config().vocab_size
        self.temperature, self.draws = temperature, draws
        key = digest(
            [weights_hash(teacher) for teacher in teachers],
            zlib.crc32(dataset.tokens.tobytes()),
            dataset.sequence_length,
            temperature,
            draws,
        )
        ids = (token_dtype(vocabulary), (dataset.sequence_length, draws))
        row = np.dtype([("checksum", np.uint32), ("ids", *ids)])
        self.file = Path(folder) / f"teachers-{key}"
        size = dataset.windows_per_epoch * row.itemsize
        with once(self.file) as missing, readable_errors(self.file):
            if missing:
                free = shutil.disk_usage(self.file.parent).free
                if size > free:
                    raise DataError(
                        f"{self.file}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; draw less "
                        "(teacher_cache.draws), or choose another folder"
                    )
                with self.file.open("wb") as out:
                    out.truncate(size)  # sparse: takes room as it is filled
        self._rows = np.memmap(self.file, dtype=row, mode="r+", shape=dataset.windows_per_epoch)

    def read(self, windows: Tensor) -> Tensor | None:
        """Ids [batch, tokens, draws] for some windows [batch]; None if one is missing."""
        rows = self._rows[windows.cpu().numpy()]
        if any(row["checksum"] != _checksum(row) for row in rows):
            return None
        return torch.from_numpy(rows["ids"].astype(np.int64)).to(windows.device)

    def write(self, windows: Tensor, logits: Tensor) -> Tensor:
        """Draw from the teachers' averaged logits [batch, tokens, vocabulary] for some windows [batch].

        Returns what `read` will: a run that fills the file has the losses of one that finds it.
        """
        p = (logits.float() / self.temperature).softmax(dim=-1)
        rows = np.zeros(len(windows), self._rows.dtype)
        ids = torch.stack([self._draw(*pair) for pair in zip(windows.tolist(), p, strict=True)])
        rows["ids"] = ids.cpu().numpy()
        for row in rows:
            row["checksum"] = _checksum(row)
        self._rows[windows.cpu().numpy()] = rows
        return ids

    def _draw(self, window: int, p: Tensor) -> Tensor:
        """Ids [tokens, draws] drawn from p [tokens, vocabulary], the same ones every time."""
        generator = torch.Generator(p.device).manual_seed(window)
        return torch.multinomial(p, self.draws, replacement=True, generator=generator)


def _checksum(row: np.void) -> int:
    """Of the content of a row; never 0, which is what a row is that was not written."""
    return zlib.crc32(row.tobytes()[4:]) or 1
