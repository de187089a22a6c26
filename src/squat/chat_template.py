"""From messages to a prompt: the checkpoint's own chat template, rendered as transformers renders it.

A template is a small Jinja program that comes with a model, also with a stranger's: it runs in jinja2's
sandbox (`squat.sandbox`), sees plain strings only, and cannot change what it is given. A message that it
leaves out without a word is an error here, so that no system prompt is lost in silence. Nothing here needs
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from squat.errors import ChatError, ToolsError
from squat.sandbox import Sandbox, bounded
from squat.tool_calls import OPEN
from squat.unicode import broken_character

Message = Mapping[str, Any]
"""Has a `role` and a `content`.

An assistant's may have `tool_calls`, a list of {"type": "function", "function": {"name", "arguments"}}, whose
arguments are a mapping; a tool's may say which call it answers, `tool_call_id`, and its `name`.
"""

ROLES = ("system", "user", "assistant", "tool")
_MORE_FIELDS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}


class ChatTemplate:
    """A template that makes one text of the messages of a conversation.

    Args:
        source: the Jinja program, `tokenizer.chat_template` of a file.
        special_tokens: by name, what the template may write: `bos_token`, `eos_token`, ...
        name: what messages of errors call the file.

    Raises:
        ChatError: it is no Jinja program.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self._name, self._special_tokens = name, dict(special_tokens)
        self._calls_tools = OPEN in source
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ChatError(
                f"{name}: chat template, line {error.lineno}: {_line(error)}; correct the checkpoint's "
                "chat_template.jinja and export it again"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **names: Any,
    ) -> str:
        """The prompt for the assistant's next message.

        Args:
            messages: the conversation.
            tools: that the model may call, as OpenAI's API has them.
            **names: what the template sees in place of its own names, such as `strftime_now`.

        Raises:
            ToolsError: the template tells the model nothing of tools or of calls, or lets it call them in
                a form other than `<tool_call>`.
            ChatError: no messages, a message that is none, a role that is unknown or that the template
                leaves out, or whatever the template itself objects to.
        """
        check_messages(messages)
        text = self._text(messages, tools, names)
        self._check_nothing_is_lost(messages, text)
        if tools and self._is_made_by(text, messages, None, names):
            raise ToolsError(
                f"tools: the chat template of {self._name} does not use them; leave them out"
            )
        if tools and not self._calls_tools:
            raise ToolsError(
                f"tools: the chat template of {self._name} has them called in a form that is not known here "
                f"(known is {OPEN}); leave them out"
            )
        if any(message.get("tool_calls") for message in messages):
            silent = [{n: v for n, v in m.items() if n != "tool_calls"} for m in messages]
            if self._is_made_by(text, silent, tools, names):
                raise ToolsError(
                    f"messages: the chat template of {self._name} leaves out tool_calls; put them into the "
                    "content of a message"
                )
        return text

    def _is_made_by(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        names: Mapping[str, Any],
    ) -> bool:
        try:
            return self._text(messages, tools, names) == text
        except ChatError:
            return False

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        names: Mapping[str, Any],
    ) -> str:
        try:
            with bounded():
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=True,
                    tools=list(tools) if tools else None,
                    documents=None,
                    **{**self._special_tokens, **names},
                )
        except _RefusedError as error:
            raise ChatError(
                f"{self._name}: chat template: {_line(error)}; give the messages that it asks for"
            ) from None
        except SecurityError as error:
            raise ChatError(
                f"{self._name}: chat template: {_line(error)}, which no template needs; take another copy "
                "of the model"
            ) from None
        except Exception as error:  # it may do whatever raises them
            raise ChatError(
                f"{self._name}: chat template: {type(error).__name__}: {_line(error)}; correct the "
                "checkpoint's chat_template.jinja and export it again"
            ) from None

    def _check_nothing_is_lost(self, messages: Sequence[Message], text: str) -> None:
        """Templates may shorten what the assistant said (its thoughts), but nobody else's messages."""
        for index, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant" or content in text:
                continue
            if json.dumps(content, ensure_ascii=False)[1:-1] not in text:  # it may be quoted
                raise ChatError(
                    f"messages: element {index}: the chat template of {self._name} leaves out this message "
                    f"of the role {message['role']!r}; put its text into a message of the user"
                )


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation.

    Raises:
        ChatError: with the place of the first message that is none.
    """
    if isinstance(messages, str) or not messages:
        raise ChatError("messages: there are none; give at least one, with a role and a content")
    for index, message in enumerate(messages):
        where = f"messages: element {index}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ChatError(f"{where}: is {message!r:.60}, expected a role and a content")
        if message["role"] not in ROLES:
            raise ChatError(
                f"{where}: role {message['role']!r} is unknown; choose {', '.join(ROLES)}"
            )
        if more := set(message) - {"role", "content"} - _MORE_FIELDS.get(message["role"], set()):
            raise ChatError(
                f"{where}: {min(more)}: the role {message['role']!r} has no such field; leave it out"
            )
        _check_calls(where, message.get("tool_calls", []))
        if not isinstance(message["content"], str):
            raise ChatError(f"{where}: content is {message['content']!r:.60}, expected a text")
        if problem := broken_character(message["content"]):
            raise ChatError(f"{where}: content: {problem}")


def turns(messages: Sequence[Message]) -> list[int]:
    """Where each turn of a conversation begins: a message of the user, and all up to the next one.

    System messages at the beginning are in front of the first turn.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    later = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
    return [first, *later]


def _check_calls(where: str, calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [calls]:
        match call:
            case {"function": {"name": str(), "arguments": Mapping()}}:
                continue
        raise ChatError(
            f"{where}: tool_calls: {call!r:.60} is no call; give a function with name and arguments"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


class _RefusedError(TemplateError):
    """What a template raises about the messages that it is given."""


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what the assistant said, for training: just a scope."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """jinja2's, without names that mean something to Python."""

    def __init__(*args: Any, **names: Any) -> None:  # `self` may be a name
        for name in dict(*args[1:], **names):
            _check_name(name)
        Namespace.__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")


def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **names: dict(*args, **names),  # not the type, which has more to it
        "namespace": _Namespace,
    }
    return environment


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own would escape what HTML must not have."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
