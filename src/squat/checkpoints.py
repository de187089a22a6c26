"""Model folders on disk: read with one clear error, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from squat.data.tokenizer import wrap_tokenizer
from squat.errors import CheckpointError, SquatError
from squat.importing.file import GgufFile
from squat.importing.model import read_model
from squat.importing.tokenizer import read_tokenizer
from squat.quantization.hf import saving  # also registers the checkpoint format with transformers

_PARTIAL = ".partial"


def load_model(name: str) -> PreTrainedModel:
    """A causal language model, float or quantized, in eval mode: a folder, a name on the Hub, or a
    .gguf file that another program wrote (`squat.importing`).

    Raises:
        CheckpointError: not there, cut short, or of an unknown kind.
    """
    if name.endswith(".gguf"):
        with quiet():
            return read_model(GgufFile(name))
    if Path(name).is_dir():
        _check_weights(Path(name))
    with quiet(), _readable(name, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    model, found = loaded
    if missing := found["missing_keys"]:  # transformers fills them with whatever is in memory
        raise CheckpointError(
            f"{name}: the weights lack {min(missing)} ({len(missing)} missing in all); the folder is not "
            "complete, or an earlier version made it: copy it again, or make it again"
        )
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model, or of a tokenizer.json made by `squat.data.train_tokenizer`.

    Raises:
        CheckpointError: there is none.
    """
    if name.endswith(".gguf"):
        return read_tokenizer(GgufFile(name))
    if name.endswith(".json"):
        try:
            return wrap_tokenizer(Tokenizer.from_file(name))
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{name}: no tokenizer.json that can be read ({error})") from None
    with quiet(), _readable(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{name}: its tokenizer has no tokenizer.json (a fast tokenizer)")
    return tokenizer


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer to `folder`, which appears complete or not at all.

    `weights`: the state of a model that is sharded over processes; by default it is the model's own.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written to.
    """

    def write(partial: Path) -> None:
        with quiet(), saving(model, weights):
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)

    write_folder(folder, write)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `folder`, then put it in its place."""
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        if folder.exists():
            old = folder.with_name(folder.name + ".old")
            os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old)
        else:
            os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); what was there before is intact"
        ) from error


def _check_weights(folder: Path) -> None:
    """Read the header of every weight file: a file that was cut short fails here."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model folder of transformers is needed")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a complete safetensors file ({error}); copy or save it again"
            ) from None


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except SquatError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{name}: no {what} could be loaded ({cause})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for what takes a moment."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
