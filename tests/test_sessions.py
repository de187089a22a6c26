"""Saved sessions: an engine that loads one goes on as the one that saved it; anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_models import chat_file
from squat.engine import Engine
from squat.errors import EngineError

TEXT = "Once upon a time there was a little girl. She loved to play outside in the park."
KINDS: dict[str, dict[str, Any]] = {
    "one width": {"activations": "8"},
    "4:8": {"activations": "4:8"},
    "4 bits": {"activations": "4"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, bytes, Path]:
    """An engine, the bytes of its session, and a file to write others to."""
    folder = tmp_path_factory.mktemp("sessions")
    engine = Engine(chat_file(folder / "model.gguf", activations="4:8"), threads=1)
    engine.prefill(engine.tokenize(TEXT))
    engine.save(folder / "it")
    return engine, (folder / "it").read_bytes(), folder / "other"


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_session_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    file, session = chat_file(tmp_path / "a.gguf", **KINDS[kind]), tmp_path / "session"
    engine = Engine(file, threads=1)
    ids = engine.tokenize(TEXT)
    engine.prefill(ids[:-9])
    engine.save(session)
    expected = [engine.decode(token) for token in ids[-9:]]
    other = Engine(file, threads=2)
    other.prefill(other.tokenize("Something else was here"))
    other.load(session)
    assert other.tokens == ids[:-9]
    for token, logits in zip(ids[-9:], expected, strict=True):
        assert (other.decode(token) == logits).all()
    widths, again = engine.widths(), other.widths()
    if kind != "4:8":
        assert widths is again is None
    else:
        assert widths is not None
        assert again is not None
        assert (widths == again).all()
        assert set(np.unique(widths)) == {4, 8}
        assert widths.shape == (engine.info.layers, len(ids))
        assert (engine.widths(len(ids) - 2) == widths[:, -2:]).all()
        assert [float(row.mean()) for row in widths == 8] == pytest.approx(engine.wide_share)


def test_a_prompt_that_was_read_is_not_read_again(saved: tuple[Engine, bytes, Path]) -> None:
    engine, content, path = saved
    path.write_bytes(content)
    fresh = engine.generate(TEXT + " And then", 8, stream=True)
    expected = "".join(fresh)
    engine.prefill(engine.tokenize("Nothing"))
    engine.load(path)
    answer = engine.generate(TEXT + " And then", 8, stream=True)
    assert "".join(answer) == expected
    assert answer.reused_tokens >= len(engine.tokenize(TEXT)) - 1
    stream = engine.generate(TEXT, 8, stream=True)
    next(stream)
    engine.load(path)
    with pytest.raises(EngineError, match="another call has used this engine"):
        list(stream)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_is_damaged_is_refused(saved: tuple[Engine, bytes, Path], data: Any) -> None:
    engine, content, path = saved
    path.write_bytes(content)
    engine.load(path)
    before, after = engine.tokens, engine.decode(5)
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:at]
    else:
        flipped = content[at] ^ data.draw(st.integers(1, 255))
        damaged = content[:at] + bytes([flipped]) + content[at + 1 :]
    engine.rewind(len(before))
    path.write_bytes(damaged)
    with pytest.raises(EngineError, match="other: "):
        engine.load(path)
    assert engine.tokens == before
    assert (engine.decode(5) == after).all()


@settings(deadline=None, max_examples=30)
@given(content=st.binary(max_size=200))
def test_nor_is_anything_else_one(saved: tuple[Engine, bytes, Path], content: bytes) -> None:
    engine, _, path = saved
    path.write_bytes(content)
    with pytest.raises(EngineError, match="other: is no saved session"):
        engine.load(path)


def test_foreign_sessions_are_refused(saved: tuple[Engine, bytes, Path], tmp_path: Path) -> None:
    engine, content, _ = saved
    path = tmp_path / "session"
    path.write_bytes(content)
    other = Engine(chat_file(tmp_path / "b.gguf", activations="4:8", seed=1), threads=1)
    with pytest.raises(EngineError, match="session: is a session of another model file"):
        other.load(path)
    short = Engine(engine._path, threads=1, context=8)
    with pytest.raises(EngineError, match="tokens, and the context is 8; load the model with"):
        short.load(path)
    with pytest.raises(EngineError, match="cannot be opened"):
        engine.load(tmp_path / "none")
    with pytest.raises(EngineError, match="cannot be written"):
        engine.save(tmp_path / "none" / "session")
    with pytest.raises(EngineError, match="begin: "):
        engine.widths(10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.gguf", "session"]


def test_generate_keeps_a_session(shell, tmp_path: Path) -> None:
    file, session = chat_file(tmp_path / "a.gguf"), tmp_path / "session"
    plain = shell.run("generate", file, TEXT, "--max-new-tokens", 5)
    for _ in range(2):
        kept = shell.run("generate", file, TEXT, "--max-new-tokens", 5, "--session", session)
        assert kept == plain
    engine = Engine(file)
    engine.load(session)
    assert engine.tokens[: len(engine.tokenize(TEXT))] == engine.tokenize(TEXT)
    session.write_bytes(session.read_bytes()[:-1])
    assert "session: is damaged" in shell.refuse("generate", file, TEXT, "--session", session)
    message = shell.refuse("generate", tmp_path, TEXT, "--session", session)
    assert "only the engine keeps sessions" in message
