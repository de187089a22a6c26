"""Vectors of texts over HTTP: what a request may say, and what comes back."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator

from squat.serving.requests import Named, is_tokens


def _inputs(value: Any) -> list[str | list[int]]:
    """One text or a list of texts, each as a string or as token ids."""
    match value:
        case str() as text if text:
            return [text]
        case [*ids] if ids and is_tokens(ids):
            return [ids]
        case [*texts] if texts and all((isinstance(t, str) or is_tokens(t)) and t for t in texts):
            return texts
    raise ValueError("give a text or its token ids, or a list of such, and none that is empty")


class EmbeddingBody(Named):
    """Of /v1/embeddings."""

    input: Annotated[list[str | list[int]], PlainValidator(_inputs)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


def embedding_list(
    vectors: list[NDArray[np.float32]],
    encoding: Literal["float", "base64"],
    tokens: int,
    model: str,
) -> dict[str, Any]:
    """The answer: vectors [hidden] in the order of the texts, which have so many tokens together."""
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: NDArray[np.float32], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
