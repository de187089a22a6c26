"""What answers look like: OpenAI's JSON objects, whole, in chunks of a stream, and for what went wrong."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from squat.engine import Generation


class RequestError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        message: what is wrong and how to put it right.
        param: the field that it is about.
        code: OpenAI's word for it, if there is one.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param or None, code, headers

    @property
    def content(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Answer:
    """What the answers to one request have in common.

    Args:
        chat: whether it is a message of a conversation, or the continuation of a text.
        model: the name of the model.
    """

    chat: bool
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, generation: Generation) -> dict[str, Any]:
        """The whole answer."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = self._choice(said if self.chat else {"text": text}, _reason(generation))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": usage(generation)}

    def first_chunk(self) -> dict[str, Any] | None:
        """What a stream begins with: who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, "", None) if self.chat else None

    def chunk(self, text: str) -> dict[str, Any]:
        """A piece of the text."""
        return self._chunk({"content": text}, text, None)

    def last_chunk(self, generation: Generation) -> dict[str, Any]:
        """Why there is no more text."""
        return self._chunk({}, "", _reason(generation))

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        """How many tokens there were."""
        return self._object(self._chunk_kind, []) | {"usage": usage(generation)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, delta: dict[str, str], text: str, reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": text}
        return self._object(self._chunk_kind, [self._choice(said, reason)])

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(generation: Generation) -> dict[str, Any]:
    """How many tokens were read and written."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.new_tokens,
        "total_tokens": generation.prompt_tokens + generation.new_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.reused_tokens},
    }


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
"""The event that ends a stream."""


def _reason(generation: Generation) -> str:
    """Where the time was up before the end, too, there was no room for more."""
    return generation.finish_reason or "length"
