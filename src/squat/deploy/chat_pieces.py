"""A chat template without Jinja: the text before, between and behind the messages of a first turn.

`squat-run` has no Jinja. Most templates (ChatML, Llama 3, Gemma, Zephyr) write the same around a message
whatever it says; export finds out what by rendering messages that occur nowhere else, and believes it only if
the template makes the same of others. What a template writes about the date becomes a form for strftime.
"""

from __future__ import annotations

from collections.abc import Sequence

from squat.chat_template import ChatTemplate, Message
from squat.errors import ChatError

DATE = "\ue000", "\ue001"
"""What stands around a form for strftime (docs/format.md)."""
_USER, _SYSTEM = "\ue010user\ue010", "\ue010system\ue010"
_OTHERS = ("Hello!", "a\n\nb", "<b>&'\"{{ x }}", "日本 ½", " \n both\t", "x " * 200)
"""Messages that a template may treat in ways of its own."""


def chat_pieces(template: ChatTemplate) -> dict[str, str]:
    """The keys below `squat.chat.` of a file with this template; none if it is not made of pieces.

    Keys: `begin` and `end` around a user's first message; `system_begin` and `system_end` around a message
    of the system in front of it, if the template has a place for one; `trim`: the roles whose messages lose
    the white space around them, separated by spaces.
    """
    parts = _split(template, [("user", _USER)])
    if parts is None:
        return {}
    trims = _trims(template, "user", [("user", _USER)])
    found = {"begin": parts[0], "end": parts[1], "trim": "user" if trims else ""}
    if not all(_renders(template, found, None, text) for text in _OTHERS):
        return {}
    parts = _split(template, [("system", _SYSTEM), ("user", _USER)])
    if parts is None or parts[2] != found["end"]:
        return found
    trims = _trims(template, "system", [("system", _SYSTEM), ("user", _USER)])
    more = {
        "system_begin": parts[0],
        "system_end": parts[1],
        "trim": f"{found['trim']} system".strip() if trims else found["trim"],
    }
    both = zip(_OTHERS, reversed(_OTHERS), strict=True)
    if all(_renders(template, found | more, told, text) for told, text in both):
        found |= more
    return found


def prompt_of(pieces: dict[str, str], told: str | None, text: str) -> str:
    """What squat-run makes of a message, and of what the model is told before."""
    text = text.strip() if "user" in pieces["trim"] else text
    if told is None:
        return pieces["begin"] + text + pieces["end"]
    told = told.strip() if "system" in pieces["trim"] else told
    return pieces["system_begin"] + told + pieces["system_end"] + text + pieces["end"]


def _rendered(template: ChatTemplate, messages: Sequence[tuple[str, str]]) -> str | None:
    """The prompt of (role, content) pairs with marked dates; None if the template refuses them."""
    conversation: list[Message] = [{"role": role, "content": text} for role, text in messages]
    try:
        return template.render(conversation, strftime_now=lambda form: f"{DATE[0]}{form}{DATE[1]}")
    except ChatError:
        return None


def _split(template: ChatTemplate, messages: Sequence[tuple[str, str]]) -> list[str] | None:
    """What stands around the messages, in their order; None if one is not there once."""
    text, parts = _rendered(template, messages), list[str]()
    for _, content in messages:
        if text is None or text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        parts.append(before)
    return None if text is None else [*parts, text]


def _trims(template: ChatTemplate, role: str, messages: Sequence[tuple[str, str]]) -> bool:
    """Whether the messages of a role lose the white space around them."""
    wide = [(r, f" \n{text}\n " if r == role else text) for r, text in messages]
    return _rendered(template, wide) == _rendered(template, messages)


def _renders(template: ChatTemplate, pieces: dict[str, str], told: str | None, text: str) -> bool:
    messages = [("user", text)] if told is None else [("system", told), ("user", text)]
    return _rendered(template, messages) == prompt_of(pieces, told, text)
