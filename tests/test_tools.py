"""Tools: what a template tells a model of them, calls in its answers, and OpenAI's client in between."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from chat_models import CHATML, HERMES, LLAMA_3, assistant, chat_file, user
from squat.chat_template import ChatTemplate
from squat.engine import Engine
from squat.errors import ChatError, FormError, ToolsError
from squat.forms import Holder, tool_calls
from squat.serving.app import Limits, Service
from squat.tool_calls import ToolCall, ToolCallReader
from tokenizer_kinds import KINDS

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Paris", "Rome"]},
                "where": {"$ref": "#/$defs/Unit"},
            },
            "required": ["place", "where"],
            "additionalProperties": False,
            "$defs": {"Unit": {"enum": ["C", "F"]}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "Rome"}}}
    ],
}
ANSWERED = {"role": "tool", "content": '{"degrees": 31}'}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Rome", "where": "C"}}\n</tool_call>'


def read(pieces: list[str]) -> list[str | ToolCall]:
    """All that a reader finds, pieces of text that follow each other joined."""
    reader, found = ToolCallReader(), list[str | ToolCall]()
    for part in [part for piece in pieces for part in reader.push(piece)] + reader.rest():
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


WEATHER_CALL = ToolCall("get_weather", '{"place": "Rome", "where": "C"}')
READ: dict[str, tuple[str, list[str | ToolCall]]] = {
    "text": ("Hello <tool> <b> <tool_", ["Hello <tool> <b> <tool_"]),
    "a call": (CALL, [WEATHER_CALL]),
    "text and calls": (f"I look.\n\n{CALL}\n{CALL}\n", ["I look.", WEATHER_CALL, WEATHER_CALL]),
    "text behind": (f"{CALL}\n And?", [WEATHER_CALL, "And?"]),
    "no end": (f"a {CALL.removesuffix('</tool_call>')}", ["a", WEATHER_CALL]),
    "no JSON": ("a <tool_call>{oh</tool_call> b", ["a <tool_call>{oh</tool_call> b"]),
    "no call": ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
    "cut": ('a <tool_call>\n{"name": "f', ['a <tool_call>\n{"name": "f']),
}


@pytest.mark.parametrize("name", READ)
@given(data=st.data())
def test_calls_are_told_from_text_however_it_is_cut(name: str, data: Any) -> None:
    text, expected = READ[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    assert read([text[a:b] for a, b in pairwise(cuts)]) == expected


@given(pieces=st.lists(st.sampled_from(["<", "tool_call>", "</tool_call>", " ", "{}", "a", CALL])))
def test_what_is_found_is_what_was_said(pieces: list[str]) -> None:
    text, found = "".join(pieces), read(pieces)
    assert found == read([text]) == read(list(text))
    if not any(isinstance(part, ToolCall) for part in found):
        assert "".join(map(str, found)) == text


@pytest.mark.parametrize("messages", [[user("Hi")], [user("Hi"), CALLED, ANSWERED]])
def test_prompts_with_tools_are_those_of_transformers(messages: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["llama-2"]())
    for tools in ([WEATHER], [WEATHER, TIME], None):
        expected = tokenizer.apply_chat_template(
            messages, tools, chat_template=HERMES, add_generation_prompt=True, tokenize=False
        )
        assert ChatTemplate(HERMES, {}, "m.gguf").render(messages, tools) == expected


IGNORES_CALLS = HERMES.replace("message.tool_calls or []", "[]")
REFUSED: dict[str, tuple[str, list[Any], Any]] = {
    "tools: the chat template of m.gguf does not use them": (CHATML, [user("a")], [TIME]),
    "tools: the chat template of m.gguf has them called in a form": (LLAMA_3, [user("a")], [TIME]),
    "messages: the chat template of m.gguf leaves out tool_calls": (
        IGNORES_CALLS,
        [user("a"), CALLED],
        [TIME],
    ),
    "messages: element 1: tool_calls: {'function': {'name': 'f'}} is no call": (
        HERMES,
        [user("a"), assistant("b") | {"tool_calls": [{"function": {"name": "f"}}]}],
        None,
    ),
    "messages: element 0: tool_calls: the role 'user' has no such field": (
        HERMES,
        [user("a") | {"tool_calls": []}],
        None,
    ),
    "messages: element 0: the chat template of m.gguf leaves out this message of the role 'tool'": (
        "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
        [ANSWERED],
        None,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_template_would_lose_is_refused(message: str) -> None:
    template, messages, tools = REFUSED[message]
    with pytest.raises(ChatError) as raised:
        ChatTemplate(template, {}, "m.gguf").render(messages, tools)
    assert str(raised.value).startswith(message)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("tools") / "tiny.gguf"
    return Engine(chat_file(path, HERMES, context=2000), threads=1)


def test_a_form_holds_calls_to_their_tools(engine: Engine) -> None:
    form = tool_calls([WEATHER, TIME])

    def passes(text: str) -> bool:
        holder = Holder(engine._form_tokenizer, form)
        for token in engine.tokenize(text):
            if holder.allowed(engine.logits([1])[0])[token] == float("-inf"):
                return False
            holder.accept(token)
        return True

    assert passes(f"I look. {CALL}\n{CALL}")
    assert passes('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    assert passes("<tool> and <b>")
    assert not passes(CALL.replace("Rome", "Oslo"))
    assert not passes(CALL.replace("get_weather", "get_news"))
    with pytest.raises(FormError, match="there are no tools to call"):
        tool_calls([])
    with pytest.raises(FormError, match="form: "):
        tool_calls([{"function": {"name": "f", "parameters": {"type": "fish"}}}])


def test_a_mark_that_leaves_no_text_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    engine = Engine(chat_file(tmp_path / "m.gguf", HERMES), threads=1)
    engine.tokenizer.add_special_tokens(["<tool_call>"])
    mark = engine.tokenizer.token_to_id("<tool_call>")
    monkeypatch.setattr(Engine, "token_bytes", lambda self, token: b"" if token == mark else b"a")
    with pytest.raises(ToolsError, match="is a control token"):
        engine.chat_tokens([user("a")], [TIME])


class Actor(Engine):
    """An engine whose model says what it is told to."""

    said = ""

    def generate(self, *args: Any, **options: Any) -> Any:
        counts = {"prompt_tokens": 9, "reused_tokens": 0, "new_tokens": 5, "logprobs": []}
        generation = SimpleNamespace(**counts, prompt=[1], finish_reason=None)

        def work(engine: Engine) -> Generator[tuple[str, list[int]], Any, None]:
            generation.engine = engine
            engine.rewind(0)
            yield "", [1]
            for letter in self.said[:-1]:
                yield letter, [1]
            generation.finish_reason = "stop"
            yield self.said[-1:], []

        generation.work = work
        return generation


def client_of(engine: Engine) -> openai.OpenAI:
    http = TestClient(Service(engine, "tiny", 0, None, Limits()).app())
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0
    )


def answers(client: openai.OpenAI, **asked: Any) -> Iterator[tuple[str | None, list[Any], str]]:
    """Text, calls and reason of an answer, whole and from a stream."""
    whole = client.chat.completions.create(model="tiny", **asked).choices[0]
    yield whole.message.content, whole.message.tool_calls or [], whole.finish_reason
    text, calls, reason = "", [], ""
    for chunk in client.chat.completions.create(model="tiny", stream=True, **asked):
        text += chunk.choices[0].delta.content or ""
        calls += chunk.choices[0].delta.tool_calls or []
        reason = chunk.choices[0].finish_reason or reason
    assert [call.index for call in calls] == list(range(len(calls)))
    yield text or None, calls, reason


def test_calls_come_back_in_openai_s_form(engine: Engine) -> None:
    actor = Actor(engine._path, threads=1)
    client, asked = client_of(actor), {"messages": [user("Hi")], "tools": [WEATHER, TIME]}
    actor.said = f"I look.\n{CALL}\n{CALL}"
    for text, calls, reason in answers(client, **asked):
        assert (text, reason, len(calls)) == ("I look.", "tool_calls", 2)
        assert [call.type for call in calls] == ["function"] * 2
        assert len({call.id for call in calls}) == 2
        assert calls[0].function.name == "get_weather"
        assert json.loads(calls[0].function.arguments) == {"place": "Rome", "where": "C"}
    for text, calls, reason in answers(client, parallel_tool_calls=False, **asked):
        assert (text, reason, len(calls)) == ("I look.", "tool_calls", 1)
    for text, calls, reason in answers(client, tool_choice="none", **asked):
        assert (text, reason, calls) == (actor.said, "stop", [])
    actor.said = CALL
    for text, calls, reason in answers(client, **asked):
        assert (text, reason, len(calls)) == (None, "tool_calls", 1)
    actor.said = "No call. <tool_call>"
    for text, calls, reason in answers(client, **asked):
        assert (text, reason, calls) == (actor.said, "stop", [])


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", None),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
    ],
)
def test_a_call_can_be_required(engine: Engine, choice: Any, name: str | None) -> None:
    """By a model of random weights, which would not call anything."""
    asked: Any = {"tools": [WEATHER, TIME], "tool_choice": choice, "temperature": 0, "seed": 1}
    messages: list[Any] = [user("The weather in Rome?")]
    client = client_of(engine)
    for text, calls, reason in answers(client, messages=messages, **asked):
        assert (text, reason, len(calls)) == (None, "tool_calls", 1)
        function = calls[0].function
        if name is not None:
            assert function.name == name
        if function.name == "get_weather":
            schema = WEATHER["function"]["parameters"]
            jsonschema.validate(json.loads(function.arguments), schema)
        else:
            assert json.loads(function.arguments) == {}

    # And the conversation goes on with what the tool has said, as the template writes it.
    message = client.chat.completions.create(model="tiny", messages=messages, **asked)
    said = message.choices[0].message
    assert said.tool_calls is not None
    call = said.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "31 degrees"}
    again = client.chat.completions.create(
        model="tiny", messages=[*messages, said, result], tools=[WEATHER, TIME], max_tokens=3
    )
    function = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    told = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    result = {"role": "tool", "content": "31 degrees"}
    prompt = engine.chat_tokens([*messages, told, result], [WEATHER, TIME])
    assert again.usage is not None
    assert again.usage.prompt_tokens == len(prompt)


BAD: dict[str, dict[str, Any]] = {
    "tools: two have the same name": {"tools": [TIME, TIME]},
    "tools.0.function.name: 'a b'": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "tools.0.type: 'code'": {"tools": [{"type": "code"}]},
    "tool_choice: 'news' is none of the tools": {
        "tools": [TIME],
        "tool_choice": {"type": "function", "function": {"name": "news"}},
    },
    "tool_choice: one is required": {"tool_choice": "required"},
    "response_format: an answer with a format": {
        "tools": [TIME],
        "response_format": {"type": "json_object"},
    },
    "form: Invalid type: fish": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "fish"}}}]
    },
    "messages.0: ": {"messages": [{"role": "tool", "content": "a"}]},
    "messages.0.tool_calls.0.function.arguments: '{': are no JSON": {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
                ],
            }
        ]
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_tool_is_said_with_its_field(engine: Engine, message: str) -> None:
    asked: Any = {"model": "tiny", "messages": [user("a")]} | BAD[message]
    with pytest.raises(openai.BadRequestError) as raised:
        client_of(engine).chat.completions.create(**asked)
    body: Any = raised.value.body
    assert message in body["message"]


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    client = client_of(Engine(chat_file(tmp_path / "m.gguf"), threads=1))
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[user("a")], tools=[TIME])
    body: Any = raised.value.body
    assert body["param"] == "tools"
    assert "does not use them; leave them out" in body["message"]
