"""Model folders on disk: read with one clear error, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from squat.data.files import writing
from squat.data.tokenizer import wrap_tokenizer
from squat.errors import CheckpointError, SquatError
from squat.finite import not_finite
from squat.importing.file import GgufFile
from squat.importing.model import read_model
from squat.importing.tokenizer import read_tokenizer
from squat.model_card import ModelCard, write_card
from squat.model_names import is_gguf
from squat.quantization import SquatConfig
from squat.quantization.hf import saving  # also registers the checkpoint format with transformers

_COPY = "copy or save it again"


def load_model(name: str) -> PreTrainedModel:
    """A causal language model, float or quantized, in eval mode: a folder, a name on the Hub, or a
    .gguf file that another program wrote (`squat.importing`).

    Raises:
        CheckpointError: not there, cut short, of an unknown kind, of another program's quantization, or with
            weights that are missing, left over, of another shape, NaN or infinite.
    """
    if is_gguf(name):
        with quiet():
            return read_model(GgufFile(name))
    recover(Path(name))
    if Path(name).is_file():
        raise CheckpointError(f"{name}: is no GGUF file; name one, or a model's folder")
    if Path(name).is_dir():
        check_files(Path(name))
    with quiet(), _readable(name, "model"):
        _check_method(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, found = loaded
    _check_weights(name, model, found)
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model, or of a tokenizer.json made by `squat.data.train_tokenizer`.

    Raises:
        CheckpointError: there is none.
    """
    if is_gguf(name):
        return read_tokenizer(GgufFile(name))
    recover(Path(name))
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
    card: ModelCard | None = None,
) -> None:
    """Write model and tokenizer to `folder`, which appears complete or not at all.

    `weights`: the state of a model that is sharded over processes; by default it is the model's own.
    `card`: what README.md there says, unless the user has written one.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written to.
    """

    def write(partial: Path) -> None:
        with quiet(), saving(model, weights):
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        write_card(card, folder.resolve().name, partial, folder)

    write_folder(folder, write)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `folder`, then put it in its place.

    What a crash leaves beside `folder` is in nobody's way: `recover` deals with it.
    """
    check_output(folder)
    partial = _beside(folder, "partial")
    try:
        recover(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if folder.exists():
            os.replace(folder, _beside(folder, "replaced"))
        os.replace(partial, folder)
        recover(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        recover(folder)
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); what was there before is intact"
        ) from error


def check_output(folder: Path) -> None:
    """Refuse a folder that must not be replaced as a whole, before the work that would be lost.

    Raises:
        CheckpointError: the current folder or one around it, a file, or a folder that holds other things.
    """
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise CheckpointError(
            f"{folder}: is the current folder or one around it, and a model's folder is replaced as a whole; "
            "name a folder for the model"
        )
    if folder.is_file():
        raise CheckpointError(f"{folder}: is there already, and a file; name another one")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: is there already, and no model's folder; name another one"
        )


def recover(folder: Path) -> None:
    """Put back, or else remove, what a crash while `folder` was replaced left beside it."""
    replaced = _beside(folder, "replaced")
    if not replaced.is_dir():
        return
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        with suppress(OSError):  # whoever needs the folder says that it is not there
            os.replace(replaced, folder)


def _beside(folder: Path, what: str) -> Path:
    """A name that nobody else gives to a folder: removing it takes nothing from anybody."""
    whole = folder.absolute()
    return whole.parent / f".{whole.name}.squat-{what}"


def check_files(folder: Path) -> None:
    """Read the header of every file of weights.

    Raises:
        CheckpointError: no model's folder, one that another program quantized, or a file that was cut short.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model folder of transformers is needed")
    for name in ("quantize_config.json", "quant_config.json"):  # of AutoGPTQ and AutoAWQ
        if (folder / name).is_file():
            raise _foreign(str(folder / name), "another program")
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a complete safetensors file ({error}); {_COPY}"
            ) from None
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        try:
            torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
        except Exception as error:  # the library raises all sorts of them
            raise CheckpointError(
                f"{file}: not a complete file of PyTorch ({type(error).__name__}); {_COPY}"
            ) from None


SUMS = "checksums.json"
"""SHA-256 of every other file of a checkpoint; written last, so that what has it is complete."""


def write_sums(folder: Path) -> None:
    """Note what the files of a checkpoint are, for `check_sums`."""
    sums = {file.name: _sum(file) for file in sorted(folder.iterdir()) if file.name != SUMS}
    with writing(folder / SUMS) as out:
        out.write(json.dumps(sums, indent=1).encode())


def check_sums(folder: Path) -> None:
    """Whether a checkpoint's files are all there, and what they were.

    Raises:
        CheckpointError: one is missing or has changed, or the checkpoint was never finished.
    """
    try:
        sums = json.loads((folder / SUMS).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder}: was not written to its end (no {SUMS})") from None
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file() or _sum(file) != expected:
            raise CheckpointError(f"{file}: is damaged or gone")


def _sum(file: Path) -> str:
    found = sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _check_method(name: str) -> None:
    """Refuse weights that another program has quantized."""
    found = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    if method != SquatConfig.quant_method:
        kind = getattr(method, "value", method) or "an unknown method"
        raise _foreign(f"{name}: config.json", str(kind))


def _foreign(where: str, method: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the weights are quantized by {method}; name the full-precision model that they were made "
        "from"
    )


def _check_weights(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Every weight of the model is in the files and the other way round, of one shape, and finite."""
    if wrong := sorted(found["mismatched_keys"]):
        key, there, expected = wrong[0]
        raise CheckpointError(
            f"{name}: weight {key} is {list(there)}, but {list(expected)} by config.json ({len(wrong)} "
            "differ in all); weights and config.json are of different models: copy both again"
        )
    if missing := found["missing_keys"]:  # transformers fills them with whatever is in memory
        raise CheckpointError(
            f"{name}: the weights lack {min(missing)} ({len(missing)} missing in all); the folder is not "
            "complete, or an earlier version made it: copy it again, or make it again"
        )
    if left := found["unexpected_keys"]:  # transformers leaves them out in silence
        raise CheckpointError(
            f"{name}: the weights hold {min(left)}, which the model of config.json has not ({len(left)} such "
            "in all); weights and config.json are of different models: copy both again"
        )
    if (bad := not_finite(model.named_parameters())) is not None:
        raise CheckpointError(
            f"{name}: weight {bad} has values that are NaN or infinite; {_COPY}, or train it again"
        )


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except SquatError:
        raise
    except Exception as error:  # the libraries raise all sorts of them
        cause = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{name}: no {what} could be loaded ({cause})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for what takes a moment, and its reports of what we say ourselves."""
    shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
