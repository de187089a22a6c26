"""A conversation in the terminal: `squat chat`.

A line is a message, or a command that begins with a slash. What the model has read stays in the engine: each
turn computes what is new of the conversation. Ctrl-C ends an answer, which stays as far as it came; Ctrl-D
ends the conversation.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from typing_extensions import Unpack

from squat.chat_template import Message
from squat.data.files import writing
from squat.engine import Engine, GenerationOptions
from squat.errors import ChatError, SquatError

HELP = "/reset begins anew, /save FILE keeps the conversation as JSON, /quit or Ctrl-D ends it"


class Conversation:
    """Messages, and an engine that answers them.

    Args:
        engine: of a file with a chat template.
        system: the message that every conversation begins with, if any.
        forget: where the context has no room for an answer, the model no longer reads the oldest messages
            and their answers (`Engine.chat`). It goes on reading `system`.
        max_new_tokens, options: of each answer, as in `Engine.generate`.

    Raises:
        SquatError: the file has no chat template, the template does not take these messages, or an option
            is out of range.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        max_new_tokens: int | None = None,
        forget: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> None:
        self._forget = forget
        self._engine, self._max_new_tokens, self._options = engine, max_new_tokens, options
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []
        self.reset()
        # Whatever is wrong with file or options is said before somebody writes a message.
        first = [*self.messages, {"role": "user", "content": "?"}]
        engine.chat(first, max_new_tokens, stream=True, **options)

    def reset(self) -> None:
        """Begin anew."""
        self.messages = list(self._beginning)

    def save(self, file: Path) -> None:
        """Write the messages as JSON.

        Raises:
            DataError: the file cannot be written.
        """
        with writing(file) as out:
            out.write(json.dumps(self.messages, indent=2, ensure_ascii=False).encode())

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to a message of the user; both become part of the conversation.

        Where the answer is not read to its end, as after Ctrl-C, it stays as far as it was read; and if
        there is none, the message is taken back.

        Raises:
            SquatError: there is no room for the message, or it is no text.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        context = self._engine.info.context
        room = self._engine.room_of(self._max_new_tokens) if self._forget else None
        ids = self._engine.chat_tokens(asked, room=room)
        if len(ids) > context:
            raise ChatError(
                f"the conversation has {len(ids)} tokens with this message, and the context is {context}: "
                "/save FILE keeps it, /reset begins anew"
            )
        return self._answer(asked, ids)

    def _answer(self, asked: list[Message], ids: list[int]) -> Generator[str, None, None]:
        context, said = self._engine.info.context, ""
        pieces = self._engine.generate(ids, self._max_new_tokens, stream=True, **self._options)
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            if said or pieces.finish_reason:
                self.messages = [*asked, {"role": "assistant", "content": said}]
        if pieces.prompt_tokens + pieces.new_tokens > context:
            way_out = (
                "the next message has room again"
                if self._forget
                else "/save FILE keeps the conversation, /reset begins anew"
            )
            raise ChatError(
                f"the context of {context} tokens is full, and the answer ends here: {way_out}"
            )


def converse(conversation: Conversation) -> None:
    """Read messages and commands from standard input, and print answers, until one of them ends it."""
    if sys.stdin.isatty():
        import readline  # noqa: F401, lines can be edited and come back from then on

        print(f"{HELP}; Ctrl-C ends an answer")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused, in words
    while (line := _next_line()) is not None:
        try:
            if line.startswith("/"):
                if _is_end(conversation, line):
                    return
            elif line.strip():
                _print_answer(conversation, line)
        except SquatError as problem:
            print(f"squat: {problem}", file=sys.stderr, flush=True)


def _next_line() -> str | None:
    """What was typed; None at the end. Ctrl-C gives up a line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None


def _is_end(conversation: Conversation, line: str) -> bool:
    """Do what a command says; whether that is to end."""
    command, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    if command == "/save" and argument:
        conversation.save(Path(argument).expanduser())
        print(f"{argument}: {len(conversation.messages)} messages")
    elif command == "/reset" and not argument:
        conversation.reset()
    elif command != "/quit" or argument:
        raise ChatError(f"{line.strip()}: no such command; {HELP}")
    return command == "/quit"


def _print_answer(conversation: Conversation, text: str) -> None:
    try:
        with closing(conversation.answer(text)) as pieces:
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            finally:
                print(flush=True)
    except KeyboardInterrupt:
        pass
