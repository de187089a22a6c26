"""Teachers' answers on disk: each window of the text is shown to them once.

An answer is a distribution over the vocabulary for every token. Kept are the `top` most probable entries
and the probability of all others together, at the temperature of the loss: 4 bytes an entry instead of
2 for every entry of the vocabulary. Read back, the others share their probability evenly.

    p(v) = kept[v]                            for the top entries
    p(v) = rest / (vocabulary - top)          for all others

A file belongs to one set of teachers, one text, one length of windows, one temperature and one `top`; all of
it is in its name. It is filled by whatever run asks first, in any order and by several processes,
and stays for later epochs and later runs. Every window carries a checksum: one that a crash left half
written counts as missing, and is asked for again.
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
        top: how many entries of each distribution are kept.

    Raises:
        DataError: the disk has no room for the file, or the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        teachers: Sequence[PreTrainedModel],
        dataset: PackedDataset,
        temperature: float,
        top: int,
    ) -> None:
        vocabulary = teachers[0].config.get_text_config().vocab_size
        self.vocabulary, self.top, self.temperature = vocabulary, min(top, vocabulary), temperature
        key = digest(
            [weights_hash(teacher) for teacher in teachers],
            zlib.crc32(dataset.tokens.tobytes()),
            dataset.sequence_length,
            temperature,
            self.top,
        )
        row = np.dtype(
            [
                ("checksum", np.uint32),
                ("rest", np.float16, dataset.sequence_length),
                ("kept", np.float16, (dataset.sequence_length, self.top)),
                ("ids", token_dtype(vocabulary), (dataset.sequence_length, self.top)),
            ]
        )
        self.file = Path(folder) / f"teachers-{key}"
        size = dataset.windows_per_epoch * row.itemsize
        with once(self.file) as missing, readable_errors(self.file):
            if missing:
                free = shutil.disk_usage(self.file.parent).free
                if size > free:
                    raise DataError(
                        f"{self.file}: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; keep fewer "
                        "entries (teacher_cache.top), or choose another folder"
                    )
                with self.file.open("wb") as out:
                    out.truncate(size)  # sparse: takes room as it is filled
        self._rows = np.memmap(self.file, dtype=row, mode="r+", shape=dataset.windows_per_epoch)

    def read(self, windows: Tensor) -> Tensor | None:
        """Logits [batch, tokens, vocabulary] of the averaged teachers; None if a window is missing.

        Divided by the temperature they are log-probabilities.
        """
        rows = self._rows[windows.cpu().numpy()]
        if any(row["checksum"] != _checksum(row) for row in rows):
            return None
        return self._logits(rows, windows.device)

    def _logits(self, rows: np.ndarray, device: torch.device) -> Tensor:
        rest = torch.from_numpy(rows["rest"].astype(np.float32)).to(device)
        kept = torch.from_numpy(rows["kept"].astype(np.float32)).to(device)
        ids = torch.from_numpy(rows["ids"].astype(np.int64)).to(device)
        logits = rest[..., None].repeat(1, 1, self.vocabulary)
        return logits.scatter_(2, ids, kept).mul_(self.temperature)

    def write(self, windows: Tensor, logits: Tensor) -> Tensor:
        """Keep the teachers' averaged logits [batch, tokens, vocabulary] of some windows [batch].

        Returns what `read` will: a run that fills the file has the losses of one that finds it.
        """
        log_p = (logits.float() / self.temperature).log_softmax(dim=-1)
        kept, ids = log_p.topk(self.top, dim=-1)
        others = max(self.vocabulary - self.top, 1)
        rest = (1 - kept.exp().sum(dim=-1)).clamp_min(1e-7) / others
        parts = {"rest": rest.log(), "kept": kept, "ids": ids}
        rows = np.zeros(len(windows), self._rows.dtype)
        for name, part in parts.items():
            rows[name] = part.cpu().numpy()
        for row in rows:
            row["checksum"] = _checksum(row)
        self._rows[windows.cpu().numpy()] = rows
        return self._logits(rows, logits.device)


def _checksum(row: np.void) -> int:
    """Of the content of a row; never 0, which is what a row is that was not written."""
    return zlib.crc32(row.tobytes()[4:]) or 1
