"""Before a file is given out: does it compute what its checkpoint does? `squat export` asks.

The joints are those of `squat parity`, on tokens that are drawn and on texts that tokenizers stumble over.
Where logits are not the same, the layer is found that makes the difference: of a file with the first layers
alone the hidden states are those that the checkpoint has behind these layers, up to that one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squat.architectures import architecture_of
from squat.data.files import readable_errors
from squat.deploy.export import describe
from squat.deploy.gguf import GgufModel, GgufSite, write_gguf
from squat.deploy.parity import compare, different_tensors
from squat.engine import Engine
from squat.errors import ParityError

_TOKENS = 48
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "  two spaces,\ta tab\nand a new line \n\n",
    "3.14159 + 2,718 = 12_345; x=y**2 // (a-b)",
    "Ünïcödé: naïve café, Straße, Ελληνικά, русский, 中文, العربية, हिन्दी",
    "emoji 🙂👩‍👩‍👧 and combining e\u0301, zero width\u200bspace",
)


def export_verified(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, file: Path
) -> None:
    """Write a quantized model, in eval mode, to a .gguf file if the engine computes with it what it does.

    Raises:
        ParityError: it does not; there is no file.
        CheckpointError: like `squat.deploy.export.export`.
    """
    described = describe(model, tokenizer, name)
    with readable_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=".squat-", dir=file.parent)
    with folder:
        draft = Path(folder.name) / file.name
        write_gguf(draft, described)
        _verify(model, tokenizer, described, draft)
        with readable_errors(file):
            os.replace(draft, file)


def _verify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, described: GgufModel, draft: Path
) -> None:
    tokens = min(_TOKENS, described.context_length)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(described.vocab_size, (tokens,), generator=drawn)
    found = compare(model, tokenizer, str(draft), [ids.tolist()], _TEXTS, described)
    if found.holds:
        return
    if found.differing:
        problem = f"codes differ in {', '.join(different_tensors(described, str(draft)))}"
    elif found.misread or not found.ends:
        problem = "the engine's tokenizer is not the checkpoint's"
    elif not found.chunked:
        problem = "the engine's logits depend on how a text is cut"
    else:
        problem = f"the engine computes otherwise in {_first_wrong(model, described, ids)}"
    raise ParityError(
        f"{described.name}: {problem}; nothing was written. This is a bug: please report it (--no-verify "
        "exports all the same)"
    )


def _first_wrong(model: PreTrainedModel, described: GgufModel, ids: torch.Tensor) -> str:
    """The first layer behind which hidden states differ, or the head; no file has convolutions alone."""
    norm = model.get_submodule(architecture_of(model.config.model_type).norm)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
        expected = [norm(state)[0].numpy() for state in states[1:-1]] + [states[-1][0].numpy()]
    first = next(i for i in range(described.layers) if described.graph.attends(i))
    with TemporaryDirectory(prefix="squat-") as folder:
        file = Path(folder) / "first.gguf"
        for layer in range(first, described.layers):
            write_gguf(file, first_layers(described, layer + 1))
            found = Engine(file).hidden_states(ids.numpy())
            if not np.allclose(found, expected[layer], rtol=1e-3, atol=1e-3):
                return f"layers 0 to {layer}" if 0 < first == layer else f"layer {layer}"
    return "the head"


def first_layers(whole: GgufModel, count: int) -> GgufModel:
    """The same file with its first layers alone."""

    def keeps(name: str) -> bool:
        return not name.startswith("blk.") or int(name.split(".")[1]) < count

    def cut(values: Sequence[Any] | None) -> Sequence[Any] | None:
        return None if values is None else values[:count]

    def cut_site(site: GgufSite) -> GgufSite:
        return replace(
            site,
            step8=cut(site.step8),
            step4=cut(site.step4),
            hadamard=cut(site.hadamard),
            levels4=cut(site.levels4),
        )

    graph = whole.graph
    return replace(
        whole,
        layers=count,
        matrices={name: matrix for name, matrix in whole.matrices.items() if keeps(name)},
        floats={name: values for name, values in whole.floats.items() if keeps(name)},
        sites={n: s if n == "head_in" else cut_site(s) for n, s in whole.sites.items()},
        thresholds=cut(whole.thresholds),
        graph=replace(
            graph,
            rotation=cut(graph.rotation),
            convolutions=cut(graph.convolutions),
            windows=cut(graph.windows),
        ),
    )
