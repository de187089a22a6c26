"""What has to be known of an architecture, from the modules of transformers to the tensors of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from squat.deploy.gguf import GgufGraph

if TYPE_CHECKING:
    from squat.importing.file import GgufFile

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Activation functions by transformers' names, and what a file calls them."""

Exact = Callable[[nn.Module], nn.Module]
"""Makes the module whose evaluation is exact (`squat.exact`) from the one of transformers."""


Rows = Callable[[NDArray[Any], int], NDArray[Any]]
"""Rows [outputs, ...] of a module, and the number of heads, to the same rows in another order."""


def as_it_is(path: str, values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    """A tensor of a file that transformers has in the same form."""
    return values


def last_rows(made: Tensor, heads: int, size: int) -> Tensor:
    """The values' part of what makes them, a weight or bias, if they come last or alone: a view.

    Args:
        made: [outputs, ...].
        heads, size: key heads, and the size of one.

    Returns:
        [heads, size, ...].
    """
    return made[-heads * size :].unflatten(0, (heads, size))


@dataclass(frozen=True)
class Architecture:
    """Where things are in a decoder of transformers, what is computed there, and what a file calls it.

    First paths in a layer, then paths in the model:

    attention: the module that calls the attention function.
    inputs: site -> the module whose input it is.
    readers: site -> the modules whose weight matrices multiply it.
    value: the module that makes the values, alone or with queries and keys.
    makers: site -> the norm or linear layer whose output it is, where nothing else reads that and the site is
        linear in it, channel by channel. (attn_out is linear in the values.)
    exact: the float modules, and what makes evaluation exact in their place.
    layers, embeddings, norm, head: of the model; the last norm is the one before the head.
    model_exact: as `exact`, around the layers.

    Then the file:

    gguf: `general.architecture`, as llama.cpp has it.
    layer_names, model_names: a module's tensors there.
    graph: what is computed, from the model's config.
    only: fields of the config and the values that they may have.
    epsilon: the field with the norms' epsilon.
    keys: more of llama.cpp's keys, which the engine does not need, from the config.
    value_rows: the values' rows of `value`.
    convolution: the row as it is in layers with a short convolution in place of attention; there `attention`
        is that module.
    file_order: module -> how its rows are ordered in a file, if otherwise.

    And files of other programs:

    fields: the config's fields from such a file's keys, which begin with the name given.
    from_file: the parameter with this path in transformers' form, from its tensor; what `graph.pairs` says
        of rows is undone already.
    """

    attention: str
    inputs: dict[str, str]
    readers: dict[str, tuple[str, ...]]
    value: str
    exact: dict[str, Exact]
    layers: str
    embeddings: tuple[str, ...]
    norm: str
    head: str
    model_exact: dict[str, Exact]
    gguf: str
    layer_names: dict[str, str]
    model_names: dict[str, str]
    graph: Callable[[Any], GgufGraph]
    fields: Callable[[GgufFile, str], dict[str, Any]]
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    epsilon: str = "rms_norm_eps"
    keys: Callable[[Any], dict[str, float | int]] = lambda config: {}
    value_rows: Callable[[Tensor, int, int], Tensor] = last_rows
    file_order: dict[str, Rows] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    from_file: Callable[[str, NDArray[np.float32], Any], NDArray[np.float32]] = as_it_is
    convolution: Architecture | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """The modules of a layer that hold a weight matrix, in the order of computation."""
        return tuple(name for names in self.readers.values() for name in names)

    def attends(self, layer: nn.Module) -> bool:
        """Whether a layer has attention."""
        return self.convolution is None or hasattr(layer, self.attention)

    def of(self, layer: nn.Module) -> Architecture:
        """The row as it is in a layer."""
        return self if self.convolution is None or self.attends(layer) else self.convolution

    def tensors(self, model: nn.Module) -> dict[str, str]:
        """The path of every module with parameters, and what a file calls its tensors."""
        inside = {
            f"{self.layers}.{index}.{path}": f"blk.{index}.{name}"
            for index, layer in enumerate(model.get_submodule(self.layers).children())
            for path, name in self.of(layer).layer_names.items()
        }
        return self.model_names | inside
