"""Clients that mean the server harm: it stays small, says no, and goes on for the others."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from chat_models import chat_file, user
from servers import running, until

SERVE = "import sys; from squat.cli import main; sys.argv = ['squat', *sys.argv[1:]]; main()"
MEGABYTE = 1 << 20
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("hostile") / "tiny.gguf")


@contextmanager
def process(file: Path) -> Iterator[tuple[str, int]]:
    """A server of its own; its address, and its process."""
    command = [sys.executable, "-c", SERVE, "serve", str(file), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split("/v1 ")[0], server.pid
        finally:
            server.kill()


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def ask(url: str, path: str = "completions", **fields: Any) -> tuple[int, Any]:
    """The status and the answer of a request that nothing is wrong with, but for these fields."""
    usual = {"prompt": "a"} if path == "completions" else {"messages": [user("a")]}
    body = json.dumps(usual | {"max_tokens": 3} | fields).encode()
    request = urllib.request.Request(f"{url}/v1/{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def memory(pid: int) -> int:
    """What a process holds, in bytes."""
    (line,) = [
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    ]
    return int(line.split()[1]) * 1024


def send_much(client: socket.socket, piece: bytes, size: int) -> None:
    """As much as the server lets in."""
    with suppress(ConnectionError):
        for _ in range(size // len(piece)):
            client.sendall(piece)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_a_gigabyte_is_refused_and_not_kept(file: Path, declared: bool) -> None:
    spaces = b" " * 65536
    with process(file) as (url, pid):
        assert ask(url)[0] == 200
        before = memory(pid)
        with closing(connect(url)) as client:
            if declared:
                client.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
            else:
                client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
                spaces = b"10000\r\n" + spaces + b"\r\n"
            send_much(client, spaces, 10**9)
            assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
        assert memory(pid) - before < 32 * MEGABYTE
        assert ask(url)[0] == 200


def test_a_head_without_end_is_not_kept(file: Path) -> None:
    with running(file) as url:
        with closing(connect(url)) as client:
            client.sendall(HEAD)
            send_much(client, b"a: " + b"b" * 60_000 + b"\r\n", 10**9)
            with suppress(ConnectionError):
                assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert ask(url)[0] == 200


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_request_that_never_begins(
    file: Path, monkeypatch: pytest.MonkeyPatch, asked_before: bool
) -> None:
    monkeypatch.setattr("squat.serving.server._HEAD_SECONDS", 0.2)
    with running(file) as url, closing(connect(url)) as client:
        if asked_before:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200 ")
        client.sendall(HEAD)
        assert client.recv(10_000) == b""  # closed, without a word
        assert ask(url)[0] == 200


def test_half_open_connections_make_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squat.serving.server._CONNECTIONS", 8)
    with running(file) as url:
        clients = [connect(url) for _ in range(40)]
        for client in clients:
            with suppress(ConnectionError):
                client.sendall(HEAD)
        assert ask(url)[0] == 200

        def is_closed(client: socket.socket) -> bool:
            client.setblocking(False)
            try:
                return client.recv(1) == b""
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        until(lambda: sum(map(is_closed, clients)) >= 32)
        assert not is_closed(clients[-1])
        for client in clients:
            client.close()


def nested(depth: int, outer: Any) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = outer(schema)
    return schema


def doubling(depth: int) -> Any:
    """Each definition asks for the next one twice."""
    both = lambda name: {"a": {"$ref": f"#/$defs/{name}"}, "b": {"$ref": f"#/$defs/{name}"}}  # noqa: E731
    definitions: Any = {
        f"d{i}": {"type": "object", "properties": both(f"d{i + 1}"), "required": ["a", "b"]}
        for i in range(depth)
    }
    return {"$defs": definitions | {f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


SCHEMAS: dict[str, Any] = {
    "objects in objects": nested(200, lambda s: {"type": "object", "properties": {"a": s}}),
    "choices in choices": nested(300, lambda s: {"anyOf": [s, {"type": "null"}]}),
    "a long string": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "repeated repetitions": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "many automata": {
        "type": "string",
        "pattern": "^" + "|".join(f"(a{{0,{i}}}b*)*c{i}" for i in range(300)) + "$",
    },
    "a long array": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "arrays of arrays": {
        "type": "array",
        "minItems": 10**5,
        "items": {"type": "array", "minItems": 10**5, "items": {"type": "string"}},
    },
    "many properties": {"properties": {f"p{i}": {"type": "integer"} for i in range(20_000)}},
    "many values": {"enum": [f"value {i}" for i in range(40_000)]},
    "doubling": doubling(40),
    "products": {
        "allOf": [
            {"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(4)]}
            for i in range(12)
        ]
    },
    "large numbers": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "itself": {"$ref": "#"},
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_schemas_that_explode_do_not(file: Path) -> None:
    with process(file) as (url, pid):
        assert ask(url)[0] == 200
        before = memory(pid)
        for name, schema in SCHEMAS.items():
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            status, answer = ask(url, "chat/completions", response_format=form)
            assert status in (200, 400), name
            assert status == 200 or answer["error"]["message"], name
        assert memory(pid) - before < 256 * MEGABYTE
        assert ask(url)[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_ten_thousand_requests_leave_nothing_behind(file: Path) -> None:
    with process(file) as (url, pid):
        held = []
        for _ in range(5):
            for number in range(2000):
                fields: Any = {"temperature": -1} if number % 10 == 0 else {"seed": number}
                status, _ = ask(url, **fields)
                assert status == (400 if number % 10 == 0 else 200)
            time.sleep(1)
            held.append(memory(pid))
        assert held[-1] - held[0] < 4 * MEGABYTE
