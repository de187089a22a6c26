"""A .gguf file of any program: keys and tensors, each checked when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from squat.errors import CheckpointError
from squat.model_names import OURS

_COPY = "the file is damaged or was cut short; copy or download it again"

Value = TypeVar("Value")


class GgufFile:
    """A model that another program wrote.

    Raises:
        CheckpointError: not there, not a complete GGUF file, or one that Squat wrote.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            what = "is a folder, expected a .gguf file" if Path(path).is_dir() else "no such file"
            raise CheckpointError(f"{path}: {what}")
        try:
            self._reader = _Reader(path)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # the library raises all sorts of them
            cause = " ".join(str(error).split())
            raise CheckpointError(f"{path}: not a complete GGUF file ({cause}); {_COPY}") from None
        if OURS in self._reader.fields:
            raise CheckpointError(
                f"{path}: is quantized by Squat already, for the engine; where a model is needed that can "
                "be trained or quantized, name the folder that the file was exported from"
            )
        if self._reader.byte_order != "I":
            raise CheckpointError(f"{path}: has another byte order than this machine; convert it")
        parts = self.get("split.count", int)
        if parts is not None and parts > 1:
            raise CheckpointError(
                f"{path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge"
            )
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def has(self, key: str) -> bool:
        """Whether the file has a key."""
        return key in self._reader.fields

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin like this."""
        return [key for key in self._reader.fields if key.startswith(prefix)]

    def get(self, key: str, kind: type[Value]) -> Value | None:
        """The value of a key, None without it.

        Numbers with a point are the shortest decimal that is the file's float32, as in 1e-05.

        Raises:
            CheckpointError: the value is of another kind.
        """
        if not self.has(key):
            return None
        field = self._reader.fields[key]
        try:
            value: Any = field.contents()
        except Exception as error:  # bytes that are no text
            raise CheckpointError(f"{self.path}: key {key}: {error}; {_COPY}") from None
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            value = float(str(np.float32(value)))
        if type(value) is not kind:
            shown = (
                f"a {type(value).__name__} of {len(value)}" if type(value) is list else repr(value)
            )
            raise CheckpointError(
                f"{self.path}: key {key} is {shown}, expected one {kind.__name__}; models of this kind are "
                "not supported, or the file is damaged"
            )
        return value

    def need(self, key: str, kind: type[Value]) -> Value:
        """The value of a key; like `get`, and raises without it, too."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(
                f"{self.path}: key {key} is missing; convert the model again, with a llama.cpp of today"
            )
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first; raises without it."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing; the file does not hold the whole model: take "
                "another copy, or convert the model again"
            )
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def weights(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A tensor's values, dequantized: float32 of this shape.

        Raises:
            CheckpointError: it is missing, has another shape, a type that is not known, or values that
                are NaN or infinite.
        """
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {list(found)}, expected {list(shape)}: the file's keys "
                "describe another model; take another copy, or convert the model again"
            )
        tensor = self.tensors[name]
        try:
            with np.errstate(all="ignore"):  # what comes of infinite scales is seen below
                values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:  # the gguf package's word for a type that it cannot read
            raise _unknown_type(self.path, name, tensor.tensor_type.name) from None
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: tensor {name} has values that are NaN or infinite; {_COPY}, or convert the "
                "model again"
            )
        return values


def printable(name: str) -> str:
    """A name that a stranger chose, on one line."""
    return name.encode("unicode_escape").decode()


def _unknown_type(path: str, tensor: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {printable(tensor)} is of type {kind}, which cannot be read; take the model as F32, "
        "F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K"
    )


class _Reader(gguf.GGUFReader):
    """The gguf package's reader, which here knows where the file ends, and which tensor is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(path)

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> NDArray[Any]:
        """Raises past the end, where the library's own has nothing, and counts on if the count is wrong."""
        values = np.frombuffer(self.data, dtype, int(count), int(offset))
        order = override_order or self.byte_order
        return values if order == "I" else values.view(values.dtype.newbyteorder(order))

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, _, _, dims, kind, offset = field.parts
            try:
                dtype = gguf.GGMLQuantizationType(int(kind[0]))
            except ValueError:
                raise _unknown_type(self.path, field.name, f"{kind[0]}") from None
            block, size = gguf.GGML_QUANT_SIZES[dtype]
            elements = int(np.prod(dims.astype(object)))
            if dims[0] % block:
                raise CheckpointError(
                    f"{self.path}: tensor {printable(field.name)} has rows of {dims[0]}, which blocks "
                    f"of {block} ({dtype.name}) do not divide; {_COPY}"
                )
            if start_offs + int(offset[0]) + elements // block * size > len(self.data):
                raise CheckpointError(
                    f"{self.path}: ends before tensor {printable(field.name)} does: {_COPY}"
                )
        super()._build_tensors(start_offs, fields)
