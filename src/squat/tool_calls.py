"""Calls of tools in what a model says: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

That is the form of ChatML templates with tools (Hermes, Qwen). A model may call several tools in one
answer, with text before them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """The name of a tool, and its arguments as a JSON object in text."""

    name: str
    arguments: str


class ToolCallReader:
    """Tells calls from text while an answer is being made.

    However the answer is cut into pieces, the result is the same. White space around calls is left out; what
    begins as a call and is none is text.
    """

    def __init__(self) -> None:
        self._held = ""  # the beginning of a call, or what may be one
        self._called = False

    def push(self, piece: str) -> list[str | ToolCall]:
        """Text and calls that are known after one more piece."""
        self._held += piece
        found: list[str | ToolCall] = []
        while (begin := self._held.find(OPEN)) >= 0:
            end = self._held.find(CLOSE, begin)
            if end < 0:
                return found
            end += len(CLOSE)
            found += self._read(self._held[:begin], self._held[begin:end])
            self._held = self._held[end:]
        shown = _shown(self._held)
        found += self._text(self._held[:shown])
        self._held = self._held[shown:]
        return found

    def rest(self) -> list[str | ToolCall]:
        """What was held back, once the answer is known to go no further; a call may lack its end."""
        held, self._held = self._held, ""
        before, opened, body = held.partition(OPEN)
        if not opened:
            return self._text(held)
        return self._read(before, opened + body)

    def _read(self, before: str, said: str) -> list[str | ToolCall]:
        call = _call(said.removeprefix(OPEN).removesuffix(CLOSE))
        if call is None:
            return self._text(before + said)
        text = self._text(before.rstrip())
        self._called = True
        return [*text, call]

    def _text(self, text: str) -> list[str | ToolCall]:
        if self._called:
            text = text.lstrip()
        if text:
            self._called = False
        return [text] if text else []


def _shown(text: str) -> int:
    """How much of a text there is before what may be the beginning of a call, with white space before it."""
    lengths = range(len(OPEN) - 1, 0, -1)
    opened = next((length for length in lengths if text.endswith(OPEN[:length])), 0)
    return len(text[: len(text) - opened].rstrip())


def _call(body: str) -> ToolCall | None:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    match content:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    return None
