"""Output that is held to a form: JSON of a schema, a regular expression, one of some texts.

Before each token, those that no text of the form goes on with lose their probability; of the others the
sampler chooses as ever. llguidance says which they are. A text that is cut short, by a limit of tokens or by
a full context, is only the beginning of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squat.errors import FormError
from squat.tool_calls import CLOSE, OPEN

Tool = Mapping[str, Any]
"""A tool as OpenAI's API has it."""

_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models write JSON. Where any space may stand, a small model can write no end of it."""


@dataclass(frozen=True)
class Form:
    """What an answer has to be; made by `json_schema`, `regex` or `choice`.

    grammar: as llguidance writes it.
    """

    grammar: str


def json_schema(schema: dict[str, Any]) -> Form:
    """JSON on one line that a schema accepts; {"type": "object"} is any object.

    Raises:
        FormError: no schema, one that nothing satisfies, or a keyword that cannot be held to.
    """
    if not isinstance(schema, dict):
        raise FormError(
            f"form: {schema!r:.60} is no schema; give an object, as in {{'type': 'object'}}"
        )
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise FormError(f"form: the schema is no JSON ({error})") from None
    return _form(lambda: _matcher().grammar_from_json_schema(text, overrides=_ONE_LINE))


def regex(pattern: str) -> Form:
    """A text that a regular expression matches as a whole, in Rust's syntax: nothing that looks around.

    Raises:
        FormError: no regular expression.
    """
    return _form(lambda: _matcher().grammar_from_regex(pattern))


def choice(texts: Sequence[str]) -> Form:
    """One of the texts.

    Raises:
        FormError: there are none.
    """
    if not texts:
        raise FormError("form: there are no texts to choose from; give at least one")
    return regex("|".join(re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", text) for text in texts))


def tool_calls(tools: Sequence[Tool], required: bool = False) -> Form:
    """A text in which every call of a tool is one of these tools, with arguments that its schema accepts.

    Args:
        tools: as OpenAI's API has them: {"type": "function", "function": {"name", "parameters", ...}}.
        required: the text is one call, and nothing else.

    Raises:
        FormError: there are no tools, or the parameters of one are no schema that can be held to.
    """
    if not tools:
        raise FormError("form: there are no tools to call; give at least one")
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters") or {"type": "object", "additionalProperties": False}
        json_schema(parameters)  # which says what is wrong with it
        begin = f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        calls.append((begin, {**parameters, "x-guidance": _ONE_LINE}, f"}}\n{CLOSE}"))
    if required:
        options = " | ".join(
            f"{json.dumps(begin)} %json {json.dumps(schema)} {json.dumps(end)}"
            for begin, schema, end in calls
        )
        return _form(lambda: f"start: {options}")
    _matcher()
    from llguidance import StructTag

    tags = [StructTag(trigger=OPEN, begin=b, grammar=schema, end=e) for b, schema, e in calls]
    return _form(lambda: StructTag.to_grammar(tags, assume_special=False))


class Holder:
    """One text on its way through a form.

    Args:
        tokenizer: llguidance's, of `tokenizer_of`.
        form: what the text has to be.
    """

    def __init__(self, tokenizer: Any, form: Form) -> None:
        self._matcher = _matcher()(tokenizer, form.grammar, log_level=0)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits [vocabulary], minus infinity where the text cannot go on with a token.

        Raises:
            FormError: it cannot go on with any, or the form has become too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[: len(logits)]
        if not mask.any():
            raise FormError(
                "form: it wants characters that no token of the model has; allow others"
            )
        return np.where(mask.astype(bool), logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise FormError(f"form: {_first_line(error)}")


class _Vocabulary:
    """What llguidance wants to know of a tokenizer, in its words."""

    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], eos_token: int, encode: Callable[[bytes], list[int]]
    ) -> None:
        self.tokens, self.eos_token_id, self._encode = tokens, eos_token, encode
        # A control token has no bytes, and is no part of a text.
        self.special_token_ids = [i for i, piece in enumerate(tokens) if not piece]
        self._ids = {piece: i for i, piece in enumerate(tokens) if piece}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text in the middle of another: behind a letter, which is taken off again."""
        ids = self._encode(b"a" + text)
        for begin in range(len(ids)):
            if b"".join(self.tokens[i] for i in ids[begin:]) == text:
                return ids[begin:]
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """Of a text that flows together with the letter: the longest token that fits, again and again."""
        ids, at = [], 0
        while at < len(text):
            pieces = (text[at:end] for end in range(at + self._longest, at, -1))
            piece = next((p for p in pieces if p in self._ids), None)
            if piece is None:
                break
            ids.append(self._ids[piece])
            at += len(piece)
        return ids


def tokenizer_of(
    tokens: list[bytes], eos_tokens: Sequence[int], encode: Callable[[bytes], list[int]]
) -> Any:
    """llguidance's view of a tokenizer.

    Args:
        tokens: each one's bytes.
        eos_tokens: what ends a text.
        encode: the tokens of a text.

    Raises:
        FormError: no end-of-sequence token, or llguidance is not installed.
    """
    if not eos_tokens:
        raise FormError("form: the model has no end-of-sequence token that could end such a text")
    _matcher()
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_Vocabulary(tokens, eos_tokens[0], encode))
    return LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=list(eos_tokens))


def _matcher() -> Any:
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise FormError(
            "form: llguidance is not installed, and this needs it: pip install 'squat[forms]'"
        ) from None
    return LLMatcher


def _form(write: Callable[[], str]) -> Form:
    try:
        grammar = write()
    except ValueError as error:
        raise FormError(f"form: {_first_line(str(error))}") from None
    failed, messages = _matcher().validate_grammar_with_warnings(grammar)
    if failed:
        raise FormError(f"form: {_first_line(messages[0])}")
    return Form(grammar)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0]
