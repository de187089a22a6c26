"""What answers look like: OpenAI's JSON objects, whole, in chunks of a stream, and for what went wrong."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from squat.engine import Engine, Generation
from squat.tool_calls import ToolCall, ToolCallReader


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


class Answer:
    """The answer to one request: it reads pieces of text, and says what to send.

    Args:
        engine: tells the text of tokens.
        generation: what is answered, as far as it is known.
        model: its name.
        chat: whether it is a message of a conversation, or the continuation of a text.
        logprobs: whether log-probabilities are wanted.
        widths: whether the tokens' widths are wanted, at the end.
        most_calls: how many tools it may call; None: as many as it likes.
        first: what stands in front of the text.
    """

    def __init__(
        self,
        engine: Engine,
        generation: Generation,
        model: str,
        *,
        chat: bool,
        logprobs: bool,
        widths: bool,
        most_calls: int | None,
        first: str,
    ) -> None:
        self._engine, self._generation, self._model = engine, generation, model
        self._chat, self._logprobs, self._widths = chat, logprobs, widths
        self._reader = None if most_calls == 0 else ToolCallReader()
        self._most_calls = most_calls
        self._first, self._text_read, self._calls = first, "", list[dict[str, Any]]()
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._told, self._offset = 0, 0  # tokens, and characters of them, in the chunks so far

    @property
    def complete(self) -> bool:
        """Whether it has called as many tools as it may."""
        return bool(self._calls) and len(self._calls) == self._most_calls

    def read(self, piece: str) -> list[dict[str, Any]]:
        """What is new with a piece of text, as the delta of a message."""
        if self.complete:
            return []
        return self._deltas(self._reader.push(piece) if self._reader else [piece])

    def rest(self) -> list[dict[str, Any]]:
        """What is new at the end of the text."""
        return self._deltas(self._reader.rest() if self._reader and not self.complete else [])

    def _deltas(self, parts: Sequence[str | ToolCall]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                self._text_read += part
                deltas.append({"content": part})
                continue
            function = {"name": part.name, "arguments": part.arguments}
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            deltas.append({"tool_calls": [{"index": len(self._calls), **call}]})
            self._calls.append(call)
            if self.complete:
                break
        return deltas

    def whole(self) -> dict[str, Any]:
        """All that was read at once."""
        text = self._first + self._text_read
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        choice = self._choice({"message": message} if self._chat else {"text": text}, self._reason)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": self._usage()}

    def first_chunk(self) -> dict[str, Any] | None:
        """What a stream begins with: who speaks, or what stands in front of the text."""
        if self._chat:
            return self._chunk({"role": "assistant", "content": ""}, None)
        return self._chunk({"content": self._first}, None) if self._first else None

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        """Something new."""
        return self._chunk(delta, None)

    def last_chunk(self) -> dict[str, Any]:
        """Why there is no more text."""
        return self._chunk({}, self._reason)

    def usage_chunk(self) -> dict[str, Any]:
        """How many tokens there were."""
        return self._object(self._chunk_kind, []) | {"usage": self._usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    @property
    def _reason(self) -> str:
        """Where the time was up before the end, too, there was no room for more."""
        reason = self._generation.finish_reason or "length"
        return "tool_calls" if self.complete or (self._calls and reason == "stop") else reason

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        return self._object(self._chunk_kind, [self._choice(said, reason)])

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        logprobs = self._new_logprobs() if self._logprobs else None
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}
        if self._widths and reason is not None:
            choice["token_widths"] = self._token_widths()
        return choice

    def _token_widths(self) -> dict[str, Any] | None:
        """Of all tokens that were read, prompt and answer: how many layers gave each of them 8 bits.

        The session must still be this answer's. None if the model gives all its tokens one width.
        """
        widths = self._generation.engine.widths()
        if widths is None:
            return None
        wide = (widths == 8).sum(axis=0).tolist()
        tokens = [
            {"text": self._text(token) or self._engine.tokenizer.id_to_token(token), "wide": count}
            for token, count in zip(self._generation.engine.tokens, wide, strict=True)
        ]
        return {"layers": len(widths), "tokens": tokens}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        generation = self._generation
        return {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.new_tokens,
            "total_tokens": generation.prompt_tokens + generation.new_tokens,
            "prompt_tokens_details": {"cached_tokens": generation.reused_tokens},
        }

    def _new_logprobs(self) -> dict[str, Any]:
        """Of the tokens since the last chunk, in the form of the one interface or the other."""
        new = self._generation.logprobs[self._told :]
        self._told += len(new)
        if self._chat:
            content = [
                self._entry(found.token, found.logprob)
                | {"top_logprobs": [self._entry(*other) for other in found.top]}
                for found in new
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for found in new:
            offsets.append(self._offset)
            self._offset += len(self._text(found.token))
        return {
            "tokens": [self._text(found.token) for found in new],
            "token_logprobs": [found.logprob for found in new],
            "top_logprobs": [{self._text(i): value for i, value in found.top} for found in new],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = list(self._engine.token_bytes(token))
        return {"token": self._text(token), "logprob": logprob, "bytes": content}

    def _text(self, token: int) -> str:
        """What is a part of a character only is U+FFFD."""
        return self._engine.token_bytes(token).decode("utf-8", "replace")


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
"""The event that ends a stream."""
