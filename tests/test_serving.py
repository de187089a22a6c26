"""The server: OpenAI's interface with its own client and with curl, one engine's texts, errors in words."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import squat
from chat_models import chat_file, system, user
from servers import client_of, metric, metrics, running, until
from squat.engine import Engine
from squat.errors import EngineError, FormError
from squat.forms import Holder
from squat.serving.app import Limits
from squat.serving.line import FullError, GoneError, Line
from squat.serving.server import listen, service_of

LONG: Any = {"prompt": "a", "max_tokens": 59_000, "temperature": 0}
OPTIONS: Any = {"temperature": 1.1, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("serving") / "tiny.gguf")


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers take long: nothing ends them but the context."""
    return chat_file(tmp_path_factory.mktemp("serving") / "long.gguf", ends=False, context=60_000)


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    return Engine(file, threads=1)


@pytest.fixture(scope="module")
def url(file: Path) -> Iterator[str]:
    with running(file) as address:
        yield address


@pytest.fixture(scope="module")
def http(file: Path) -> TestClient:
    """Requests without a network."""
    limits = Limits(body=20_000, tokens=40)
    return TestClient(service_of(str(file), None, limits).app(), raise_server_exceptions=False)


def test_its_texts_are_the_engines(url: str, engine: Engine) -> None:
    client = client_of(url)
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    messages: Any = [system("Be brief."), user("Hello!")]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=20, **OPTIONS
    )
    expected = engine.chat(messages, 20, stream=True, **OPTIONS)
    assert answer.choices[0].message.content == "".join(expected)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.chat_tokens(messages))
    assert answer.usage.completion_tokens == 20
    messages[0]["role"] = "developer"
    messages[1]["content"] = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    again = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=20, user="me", n=1, **OPTIONS
    )
    assert again.choices[0].message == answer.choices[0].message
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1

    text = engine.generate("Once upon", 16, **OPTIONS)
    for prompt in ("Once upon", ["Once upon"], engine.tokenize("Once upon")):
        found = client.completions.create(model="tiny", prompt=prompt, **OPTIONS)
        assert found.choices[0].text == text  # 16 tokens are the usual number
    negative = client.completions.create(model="tiny", prompt="Once upon", seed=-1)
    assert negative.choices[0].text == engine.generate(
        "Once upon", 16, temperature=1.0, seed=2**64 - 1
    )


def test_without_a_seed_texts_differ(url: str) -> None:
    client = client_of(url)
    texts = {client.completions.create(model="tiny", prompt="a").choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_a_stream_is_the_whole_answer(url: str, engine: Engine) -> None:
    client, messages = client_of(url), [user("Hello!")]
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=30, stream=True,
            stream_options={"include_usage": True}, **OPTIONS,
        )
    )  # fmt: skip
    *said, end, usage = chunks
    assert said[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in said]
    assert "".join(pieces) == engine.chat(messages, 30, **OPTIONS)
    assert len(pieces) > 15
    assert (end.choices[0].finish_reason, end.choices[0].delta.content) == ("length", None)
    assert usage.choices == []
    assert usage.usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1
    stream = client.completions.create(
        model="tiny", prompt="Once", max_tokens=30, stream=True, **OPTIONS
    )
    texts = [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == engine.generate("Once", 30, **OPTIONS)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_prompt_in_front(url: str, engine: Engine, stream: bool) -> None:
    for prompt in ("Once upon", engine.tokenize("Once upon")):
        found = client_of(url).completions.create(
            model="tiny", prompt=prompt, echo=True, stream=stream, **OPTIONS
        )
        chunks = found if stream else [found]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == "Once upon" + engine.generate("Once upon", 16, **OPTIONS)
    with pytest.raises(openai.BadRequestError, match="leave out echo or logprobs"):
        client_of(url).completions.create(model="tiny", prompt="a", echo=True, logprobs=1)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_not_shown(url: str, engine: Engine, stream: bool) -> None:
    client, messages = client_of(url), [user("Hello!")]
    whole = engine.chat(messages, 40, **OPTIONS)
    for stop in (whole[9:13], ["never", whole[20:22]]):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=40, stop=stop, stream=stream, **OPTIONS
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            text = "".join(chunk.delta.content or "" for chunk in chunks)
            reason = chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        first = stop if isinstance(stop, str) else stop[1]
        assert text == whole[: whole.index(first)]
        assert reason == "stop"


def test_a_response_format_is_kept(url: str) -> None:
    client = client_of(url)
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "boolean"}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=[user("a")], response_format=wanted, seed=seed
        )
        said = json.loads(answer.choices[0].message.content or "")
        assert set(said) == {"colour", "n"}
        assert said["colour"] in ("red", "blue")
        assert answer.choices[0].finish_reason == "stop"
    beginning = client.chat.completions.create(
        model="tiny", messages=[user("a")], response_format={"type": "json_object"}, max_tokens=2
    )
    assert (beginning.choices[0].message.content or "").startswith("{")


def test_log_probabilities_are_those_of_the_logits(url: str, engine: Engine) -> None:
    client, messages = client_of(url), [user("Hello!")]
    asked: Any = {"model": "tiny", "messages": messages, "max_tokens": 12, **OPTIONS}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=3, **asked)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    generation = engine.chat(messages, 12, stream=True, logprobs=3, **OPTIONS)
    text = "".join(generation)
    assert answer.choices[0].message.content == text
    assert b"".join(bytes(token.bytes or ()) for token in content).decode(errors="replace") == text

    ids = engine.chat_tokens(messages)
    logits = engine.logits(ids + [found.token for found in generation.logprobs]).astype(np.float64)
    rows = logits[len(ids) - 1 : -1]
    expected = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    for token, found, row in zip(content, generation.logprobs, expected, strict=True):
        assert token.logprob == found.logprob == pytest.approx(row[found.token])
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(
            np.sort(row)[:-4:-1]
        )

    chunks = list(
        client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **asked)
    )
    streamed = [part for c in chunks for part in (c.choices[0].logprobs.content or [])]
    assert [part.model_dump() for part in streamed] == [part.model_dump() for part in content]

    found = client.completions.create(
        model="tiny", prompt=ids, max_tokens=12, logprobs=2, **OPTIONS
    ).choices[0].logprobs  # fmt: skip
    assert found is not None
    assert found.token_logprobs == [token.logprob for token in content]
    assert found.tokens == [token.token for token in content]
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(12)]
    assert found.top_logprobs is not None
    assert all(1 <= len(others) <= 2 for others in found.top_logprobs)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str, engine: Engine) -> None:
    def curl(path: str, *options: str) -> str:
        command = ["curl", "--silent", "--no-buffer", *options, url + path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = {"messages": [user("Hello!")], "max_tokens": 5, "temperature": 0}
    text = engine.chat([user("Hello!")], 5)
    answer = json.loads(curl("/v1/chat/completions", "--data", json.dumps(body)))
    assert answer["choices"][0]["message"]["content"] == text
    events = curl("/v1/chat/completions", "--data", json.dumps(body | {"stream": True}))
    assert events.endswith("data: [DONE]\n\n")
    *chunks, _ = [line.removeprefix("data: ") for line in events.split("\n\n")[:-1]]
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert json.loads(curl("/health")) == {"status": "ok"}
    headers = curl("/metrics", "--include")
    assert "content-type: text/plain; version=0.0.4" in headers.lower()
    assert "# TYPE squat_requests_total counter\n" in headers
    assert 'squat_requests_total{path="/v1/chat/completions",status="200"}' in headers


def test_several_clients_at_once_get_what_one_gets(url: str, engine: Engine) -> None:
    prompts = [f"{'Once upon a time ' * (n % 3)}there were {n}" for n in range(12)]
    expected = [engine.generate(prompt, 24, **OPTIONS) for prompt in prompts]

    def ask(index: int) -> str:
        client = client_of(url)
        if index % 2:
            stream = client.completions.create(
                model="tiny", prompt=prompts[index], max_tokens=24, stream=True, **OPTIONS
            )
            return "".join(chunk.choices[0].text for chunk in stream)
        answer = client.completions.create(
            model="tiny", prompt=prompts[index], max_tokens=24, **OPTIONS
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(len(prompts)) as threads:
        for _ in range(3):
            assert list(threads.map(ask, range(len(prompts)))) == expected


CHAT: Any = {"messages": [user("a")], "max_tokens": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature: -1: ": ({"temperature": -1}, "temperature"),
    "temperature: 'hot': ": ({"temperature": "hot"}, "temperature"),
    "temperature: inf: ": ({"temperature": float("inf")}, "temperature"),
    "top_p: -0.5: ": ({"top_p": -0.5}, "top_p"),
    "top_p: 0: ": ({"top_p": 0}, "top_p"),
    "max_tokens: -1: ": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens: 1.5: ": ({"max_tokens": 1.5}, "max_tokens"),
    "max_tokens: 41 is above this server's 40": ({"max_tokens": 41}, "max_tokens"),
    "seed: 1180591620717411303424: ": ({"seed": 2**70}, "seed"),
    "give one of them": ({"max_completion_tokens": 2}, ""),
    "stop.0: '': ": ({"stop": ""}, "stop.0"),
    "stop.1: '': ": ({"stop": ["a", ""]}, "stop.1"),
    "stop: 5: ": ({"stop": 5}, "stop"),
    "stream: 'yes': ": ({"stream": "yes"}, "stream"),
    "n: 2 is not supported here; leave it out": ({"n": 2}, "n"),
    "logprobs: 3: ": ({"logprobs": 3}, "logprobs"),
    "top_logprobs: 21: ": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs needs logprobs; set it to true": ({"top_logprobs": 2}, ""),
    "tools.0.type: Field required": ({"tools": [{}]}, "tools.0.type"),
    "response_format.type: 'xml': ": (
        {"response_format": {"type": "xml"}},
        "response_format.type",
    ),
    'json_schema goes with type "json_schema"': (
        {"response_format": {"type": "json_schema"}},
        "response_format",
    ),
    "form: Invalid type: fish": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "fish"}},
            }
        },
        "response_format",
    ),
    "logit_bias: {'5': 1} is not supported": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "presence_penalty: 0.5 is not": ({"presence_penalty": 0.5}, "presence_penalty"),
    "temprature: is unknown here; leave it out": ({"temprature": 1}, "temprature"),
    "messages: ": ({"messages": []}, "messages"),
    "messages: 'a': ": ({"messages": "a"}, "messages"),
    "messages.0.role: 'friend': ": (
        {"messages": [{"role": "friend", "content": "a"}]},
        "messages.0.role",
    ),
    "messages.0: {'role': 'user'}: content: is missing": (
        {"messages": [{"role": "user"}]},
        "messages.0",
    ),
    "messages.0.content.0.type: 'image_url': ": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content.0.type",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_is_said_with_its_field(http: TestClient, message: str) -> None:
    change, param = REFUSED[message]
    answer = http.post("/v1/chat/completions", content=json.dumps(CHAT | change))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param or None)
    fine = http.post("/v1/chat/completions", json=CHAT | {"n": 1, "tools": [], "logprobs": False})
    assert fine.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is no JSON: "),
        (b"{", 400, "the body is no JSON: "),
        (b"\xff", 400, "the body is no JSON: "),
        (b"[" * 100_000, 413, "the request has more than 20000 bytes; shorten it"),
        (b"[" * 19_000, 400, "the body is no JSON: "),
        (b'"a"', 400, "the body is no JSON object"),
        (b'{"prompt": "\\ud83d"}', 400, "is U+D83D, half of a character"),
        (b'{"prompt": "a", "\\ud83d": 1}', 400, "unable to parse"),
        (
            b'{"prompt": "a", "model": "gpt-4"}',
            404,
            "'gpt-4' does not exist; this server has 'tiny'",
        ),
        (b'{"prompt": "a", "model": "\\ud83d"}', 404, "does not exist"),
        (b'{"prompt": ["a", "b"]}', 400, "give one text, or the token ids of one"),
        (
            b'{"prompt": [5, 100000]}',
            400,
            "prompt: token 100000 is outside the model's vocabulary of 302",
        ),
        (b'{"prompt": [-5]}', 400, "prompt"),
        (b'{"prompt": [99999999999]}', 400, "prompt: token 99999999999"),
        (b"{}", 400, "prompt: Field required"),
    ],
)
def test_requests_that_are_none(http: TestClient, body: bytes, status: int, message: str) -> None:
    for stream in (b"", b', "stream": true}'):
        sent = body[:-1] + stream if stream and body.endswith(b"}") and len(body) > 2 else body
        answer = http.post("/v1/completions", content=sent)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_prompt_beyond_the_context(url: str) -> None:
    client, text = client_of(url), "long " * 600
    for ask in (
        lambda: client.completions.create(model="tiny", prompt=text),
        lambda: client.completions.create(model="tiny", prompt=text, stream=True),
        lambda: client.chat.completions.create(model="tiny", messages=[user(text)]),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            ask()
        assert raised.value.code == "context_length_exceeded"
        assert "tokens, and the model's context is 512; shorten it" in raised.value.message
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"enum": []},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "string", "pattern": "^a$", "minLength": 4},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_nothing_satisfies(url: str, schema: Any, stream: bool) -> None:
    client = client_of(url)
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="form: Unsatisfiable schema") as raised:
        client.chat.completions.create(
            model="tiny", messages=[user("a")], response_format=wanted, stream=stream
        )
    assert raised.value.param == "response_format"
    assert client.completions.create(model="tiny", prompt="a").usage is not None


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (FormError, 400, "invalid_request_error"),
        (EngineError, 500, "server_error"),
    ],
)
def test_an_answer_that_breaks_off_says_why(
    url: str, monkeypatch: pytest.MonkeyPatch, error: type[EngineError], status: int, kind: str
) -> None:
    taken = 0

    def accept(self: Holder, token: int) -> None:
        nonlocal taken
        taken += 1
        if taken % 3 == 0:
            raise error("form: something broke")

    monkeypatch.setattr(Holder, "accept", accept)
    client = client_of(url)
    asked: Any = {"messages": [user("a")], "response_format": {"type": "json_object"}}
    with pytest.raises(openai.APIStatusError, match="form: something broke") as raised:
        client.chat.completions.create(model="tiny", **asked)
    assert (raised.value.status_code, raised.value.type) == (status, kind)
    with pytest.raises(openai.APIError, match="form: something broke"):
        list(client.chat.completions.create(model="tiny", stream=True, **asked))
    assert client.completions.create(model="tiny", prompt="a").usage is not None


def test_huge_numbers(url: str, engine: Engine, http: TestClient) -> None:
    client = client_of(url)
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=10**30, temperature=0)
    assert answer.choices[0].text == engine.generate("a", None)  # what the context has room for
    for body, message in (
        ('{"prompt": "a", "temperature": 1e999}', "temperature: inf"),
        ('{"prompt": "a", "top_p": NaN}', "top_p: nan"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "the body is no JSON"),
    ):
        refused = http.post("/v1/completions", content=body)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


def test_routes_that_are_none(http: TestClient) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_file_without_a_chat_template_completes_text(tmp_path: Path) -> None:
    file = chat_file(tmp_path / "plain.gguf", None)
    http = TestClient(service_of(str(file), None, Limits()).app())
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 400
    assert "plain.gguf: has no chat template" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_the_usual_number_of_tokens_is_below_the_limit(file: Path) -> None:
    http = TestClient(service_of(str(file), None, Limits(tokens=5)).app())
    for path, body in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [user("a")]}),
    ):
        answer = http.post(f"/v1/{path}", json=body | {"temperature": 0}).json()
        assert answer["usage"]["completion_tokens"] == 5


def test_a_server_may_forget_the_beginning_of_a_conversation(file: Path, engine: Engine) -> None:
    http = TestClient(service_of(str(file), None, Limits(forget=True)).app())
    turn = [user("Hello!"), {"role": "assistant", "content": "long " * 40}]
    messages = [system("Be brief."), *turn * 30, user("And now?")]
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body).json()
    kept = next(
        tail
        for begin in range(1, len(messages), 2)
        if len(engine.chat_tokens(tail := [messages[0], *messages[begin:]])) + 9
        <= engine.info.context
    )
    assert 2 < len(kept) < len(messages)
    assert answer["choices"][0]["message"]["content"] == engine.chat(kept, 9)
    assert answer["usage"]["prompt_tokens"] == len(engine.chat_tokens(kept))
    refused = http.post("/v1/chat/completions", json=body | {"messages": [user("long " * 600)]})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_the_api_key(file: Path) -> None:
    http = TestClient(service_of(str(file), "secret", Limits()).app())
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
            ("GET", "/metrics"),
        ):
            answer = http.request(method, path, headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert http.get("/health").status_code == 200
    assert http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream",
    "stream_options", "n", "logprobs", "tools", "user", "suffix", "x",
]  # fmt: skip


@settings(max_examples=150)
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    usual=st.booleans(),
)
def test_no_request_breaks_the_server(http: TestClient, path: str, body: Any, usual: bool) -> None:
    beginning: Any = {"prompt": "a"} if path == "completions" else {"messages": [user("a")]}
    answer = http.post(f"/v1/{path}", content=json.dumps((beginning if usual else {}) | body))
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_hangs_up(long_file: Path, stream: bool) -> None:
    with running(long_file) as url:
        body = json.dumps(LONG | {"stream": stream}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            if stream:
                assert b"data: " in client.recv(100_000) + client.recv(100_000)
            else:
                until(lambda: metric(url, "squat_clients") == 1)
        until(lambda: metric(url, "squat_clients") == 0)
        until(lambda: metric(url, 'squat_tokens_total{kind="generated"}') > 0)
        assert metric(url, 'squat_tokens_total{kind="generated"}') < 50_000
        assert client_of(url).completions.create(model="long", prompt="a").choices[0].text


def test_a_client_that_does_not_read_keeps_nobody_waiting(
    long_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squat.serving.app._SEND_SECONDS", 0.2)
    with running(long_file) as url, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        body = json.dumps(LONG | {"stream": True})
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        until(lambda: metric(url, "squat_clients") == 1)
        assert client_of(url).completions.create(model="long", prompt="a").choices[0].text
        assert metric(url, 'squat_tokens_total{kind="generated"}') < 59_000


def test_whoever_finds_no_place_is_told_when_to_come_back(long_file: Path) -> None:
    with running(long_file, waiting=1, parallel=1) as url, ThreadPoolExecutor(1) as thread:
        client = client_of(url)
        stream = client.completions.create(model="long", prompt="a", max_tokens=59_000, stream=True)
        next(iter(stream))
        waiting = thread.submit(
            client_of(url).completions.create, model="long", prompt="b", temperature=0
        )
        until(lambda: metric(url, "squat_clients") == 2)
        with pytest.raises(openai.InternalServerError, match="try again in") as raised:
            client.completions.create(model="long", prompt="c")
        assert raised.value.status_code == 503
        assert int(raised.value.response.headers["Retry-After"]) >= 1
        assert client.models.list().data  # whoever needs no engine needs no place
        stream.close()
        expected = Engine(long_file, threads=1).generate("b", 16)
        assert waiting.result(timeout=60).choices[0].text == expected


def test_answers_in_progress_go_on_together(long_file: Path) -> None:
    with running(long_file, parallel=3) as url, ThreadPoolExecutor(1) as thread:
        client = client_of(url)
        streams = [
            client.completions.create(model="long", prompt=p, max_tokens=59_000, stream=True)
            for p in ("a", "b")
        ]
        for _ in range(3):  # each has more to say while the other one is not over
            for stream in streams:
                next(iter(stream))
        vector = client.embeddings.create(model="long", input="c").data[0].embedding
        alone = Engine(long_file, threads=1)
        assert vector == pytest.approx(alone.embed(["c"])[0].tolist())
        streams.append(
            client.completions.create(model="long", prompt="c", max_tokens=59_000, stream=True)
        )
        last = thread.submit(
            client_of(url).completions.create, model="long", prompt="d", temperature=0
        )
        until(lambda: metric(url, "squat_clients") == 4)
        assert not last.done()
        streams[0].close()
        assert last.result(timeout=60).choices[0].text == alone.generate("d", 16)
        for stream in streams[1:]:
            next(iter(stream))
            stream.close()


def test_every_conversation_finds_its_session(url: str) -> None:
    client = client_of(url)
    talks: list[Any] = [[user(f"{n} is my number. " + "It is dear to me. " * n)] for n in range(4)]
    lengths = [0] * 4
    for _ in range(3):
        for n, talk in enumerate(talks):
            answer = client.chat.completions.create(model="tiny", messages=talk, max_tokens=8)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert cached is not None
            assert cached >= lengths[n]
            lengths[n] = answer.usage.prompt_tokens - 4  # the answer may change the last ones
            talk += [answer.choices[0].message.model_dump(exclude_none=True), user("More.")]


def test_a_request_that_does_not_arrive(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squat.serving.app._READ_SECONDS", 0.1)
    with running(file) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
            )
            assert client.recv(100_000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
            )
        label = '{path="/v1/completions",status="499"}'
        until(lambda: f"squat_requests_total{label} 1" in metrics(url))


def test_the_line_is_in_order_of_arrival() -> None:
    async def go() -> None:
        line, order = Line(1, 3), []

        async def present() -> bool:
            return False

        async def come(name: int) -> None:
            place = line.join()
            try:
                await place.reach(present)
                order.append(name)
                await asyncio.sleep(0.01)
            finally:
                place.leave()
                place.leave()  # twice is once

        tasks = [asyncio.ensure_future(come(name)) for name in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(FullError):
            line.join()
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 3]
        assert len(line) == 0

        first, second = line.join(), line.join()

        async def gone() -> bool:
            return True

        with pytest.raises(GoneError):
            await second.reach(gone)
        first.leave()

    asyncio.run(go())


def test_an_answer_ends_when_its_time_is_up(long_file: Path) -> None:
    http = TestClient(service_of(str(long_file), None, Limits(seconds=0.2)).app())
    answer = http.post("/v1/completions", json=LONG).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 0 < answer["usage"]["completion_tokens"] < 59_000


def test_what_is_in_the_way_of_serving(shell, file: Path, monkeypatch, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        message = shell.refuse("serve", file, "--port", port)
        assert f"127.0.0.1:{port}: cannot listen there (Address already in use)" in message
    for host in ("no.such.host.invalid", "192.0.2.1", "." * 300):
        assert "cannot listen there" in shell.refuse("serve", file, "--host", host, "--port", 0)
    assert "none.gguf" in shell.refuse("serve", tmp_path / "none.gguf", "--port", 0)
    assert shell.run("serve", file, "--port", 70_000)[0] == 2
    assert "--api-key: is empty" in shell.refuse("serve", file, "--port", 0, "--api-key", "")
    monkeypatch.setattr(squat, "serving", squat.serving)  # so that it comes back with its modules
    for name in list(sys.modules):
        if name.split(".")[0] in ("starlette", "uvicorn") or name.startswith("squat.serving"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    message = shell.refuse("serve", file)
    assert message == (
        "squat: serve: starlette.applications is not installed; install it with pip install 'squat[serve]'"
    )


def test_the_command_serves_until_it_is_told_to_end(long_file: Path) -> None:
    code = "from squat.cli import main; import sys; sys.argv = ['squat', *sys.argv[1:]]; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(long_file), "--port", "0", "--api-key", "k"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url, told = process.stdout.readline().split("/v1 ", 1)
        assert told == "answers as long; Ctrl-C ends it\n"
        client = client_of(url, "k")
        answer = client.completions.create(model="long", prompt="a", max_tokens=3)
        assert answer.usage is not None
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "x").models.list()
        stream = iter(client.completions.create(model="long", stream=True, **LONG))
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server was told to end"):
            list(stream)
        _, error = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert (process.returncode, error) == (-signal.SIGTERM, "")
