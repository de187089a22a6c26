"""Answers that are computed together: each is the one that it is alone, whoever else is there."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import TEXT, random_model
from squat import forms
from squat.batch import Batch
from squat.deploy.gguf import write_gguf
from squat.engine import Engine, Generation
from squat.errors import EngineError, FormError

MODELS = {
    "4:8": {},
    "4:8 by rarity": {"importance": "rarity"},
    "4": {"activations": "4", "wide_first_token": True},
    "8, no multiple of 32": {
        "activations": "8",
        "hidden": 40,
        "ffn": 53,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 6,
    },
    "windows": {"windows": [8, 0]},
}


@pytest.fixture(scope="module", params=MODELS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(3, layers=2, context=600, **MODELS[request.param])
    if model.importance == "rarity":
        model.thresholds = [100.0, 150.0]
    path = tmp_path_factory.mktemp("batch") / "model.gguf"
    write_gguf(path, model)
    return path


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    return Engine(file, threads=2)


@pytest.fixture(scope="module")
def alone(file: Path) -> Engine:
    return Engine(file, threads=1)


prompts = st.lists(
    st.text("abcdefgh ,.üñ", min_size=1, max_size=12) | st.sampled_from([TEXT + TEXT, TEXT[:60]]),
    min_size=1,
    max_size=9,
)


@settings(max_examples=25, deadline=None)
@given(
    prompts=prompts,
    size=st.integers(1, 5),
    tokens=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.sampled_from([(), ("e", " a")]),
)
def test_every_answer_is_the_one_it_is_alone(
    engine: Engine, alone: Engine, prompts: list[str], size: int, tokens: int, temperature: float,
    stop: tuple[str, ...],
) -> None:  # fmt: skip
    options = {"temperature": temperature, "stop": stop, "seed": 4}
    found = engine.batch(size).generate(prompts, tokens, **options)
    assert found == [alone.generate(prompt, tokens, **options) for prompt in prompts]


def test_pieces_come_as_they_are_known_and_together(engine: Engine, alone: Engine) -> None:
    prompts = [TEXT[: 10 * n] for n in range(1, 7)]
    pieces = list(engine.batch(3).stream(prompts, 10))
    for index, prompt in enumerate(prompts):
        assert "".join(p for i, p in pieces if i == index) == alone.generate(prompt, 10)
    order = [index for index, _ in itertools.groupby(index for index, _ in pieces)]
    assert len(order) > len(prompts)  # they take turns


def test_answers_join_and_leave_at_any_time(engine: Engine, alone: Engine) -> None:
    rng = np.random.default_rng(1)
    batch, running, done = engine.batch(3), {}, {}
    waiting = {n: [int(i) for i in rng.integers(3, 250, rng.integers(1, 40))] for n in range(12)}
    expected = {
        n: alone.generate(ids, 3 + n, temperature=1.0, seed=n) for n, ids in waiting.items()
    }
    while waiting or running:
        while waiting and len(running) < 3 and rng.random() < 0.5:
            n, ids = waiting.popitem()
            answer = engine.generate(ids, 3 + n, temperature=1.0, seed=n, stream=True)
            running[n], done[n] = batch.join(answer), ""
        if not running:
            continue
        some = {n: part for n, part in running.items() if rng.random() < 0.7}
        for n, piece in zip(some, batch.step(list(some.values())) if some else [], strict=True):
            done[n] += piece
        for n in [n for n, part in running.items() if part.complete]:
            batch.leave(running.pop(n))
    assert done == expected


def test_a_session_goes_to_whom_it_fits(engine: Engine, file: Path) -> None:
    batch = engine.batch(3)
    conversations = [TEXT[:40], TEXT[7:60], TEXT[20:55]]
    batch.generate(conversations, 4)
    answers = [engine.generate(text + " more", 2, stream=True) for text in reversed(conversations)]
    for answer in answers:
        batch.join(answer)
        assert answer.reused_tokens > 5
    assert len({id(answer.engine) for answer in answers}) == 3
    assert engine.tokens == []  # its own session has nothing to do with it


def test_a_stream_that_nobody_reads_to_its_end_frees_its_sessions(engine: Engine) -> None:
    batch = engine.batch(2)
    stream = batch.stream(["a", "b", "c"], 20)
    next(stream)
    with pytest.raises(EngineError, match="all sessions are taken"):
        batch.join(engine.generate("d", 3, stream=True))
    stream.close()
    assert batch.generate(["d", "e"], 3) == [engine.generate(p, 3) for p in ("d", "e")]


def test_forms_are_held_to(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    form = forms.json_schema({"type": "array", "items": {"type": "boolean"}, "maxItems": 3})
    texts = engine.batch(3).generate(["a", "b", TEXT[:80]], 60, form=form)
    for text in texts:
        assert all(isinstance(item, bool) for item in json.loads(text))


def test_what_ends_one_answer_ends_no_other(engine: Engine, alone: Engine) -> None:
    class Broken:
        complete = False

        def allowed(self, logits: object) -> object:
            raise FormError("form: too large to be held to")

    batch = engine.batch(2)
    bad, good = (engine.generate(p, 5, stream=True) for p in ("a", "b"))
    bad._holder = Broken()  # type: ignore[assignment]
    parts, text = [batch.join(bad), batch.join(good)], ""
    while left := [part for part in parts if not part.complete]:
        text += batch.step(left)[-1]
    assert isinstance(parts[0].error, FormError)
    assert parts[1].error is None
    assert text == alone.generate("b", 5)
    bad = engine.generate("a", 5, stream=True)
    bad._holder = Broken()  # type: ignore[assignment]
    batch = engine.batch(1)
    with pytest.raises(FormError):
        list(batch.run([bad]))
    assert batch.generate(["b"], 5) == [text]


def test_an_answer_that_is_over_is_let_go(engine: Engine) -> None:
    made: list[weakref.ref[Generation]] = []

    def answers() -> Iterator[Generation]:
        for n in range(12):
            answer = engine.generate(f"{n}", 1 + n % 3, stream=True)
            made.append(weakref.ref(answer))
            yield answer

    gc.disable()  # what has to wait for it may wait for long
    try:
        for _ in engine.batch(2).run(answers()):
            assert sum(answer() is not None for answer in made) <= 4
    finally:
        gc.enable()


def test_more_sessions_than_a_pass_has_tokens(engine: Engine, alone: Engine) -> None:
    prompts = [f"{n}{TEXT[: n % 30]}" for n in range(140)]
    found = engine.batch(140).generate(prompts, 3)
    assert found == [alone.generate(prompt, 3) for prompt in prompts]


def test_a_shorter_context(file: Path) -> None:
    engine = Engine(file, threads=1, context=50)
    found = engine.batch(2, context=20).generate(["ab", "cd ef"], None, temperature=1.0)
    short = Engine(file, threads=1, context=20)
    assert found == [short.generate(p, None, temperature=1.0) for p in ("ab", "cd ef")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.batch(0), "size: 0 is below 1"),
        (
            lambda engine: engine.batch(2, context=10**6),
            "context: 1000000 is more than the engine's",
        ),
        (lambda engine: engine.batch(2, context=-1), "context: -1 is out of range"),
        (lambda engine: engine.batch(2).generate("ab"), "prompts: is one string"),
        (lambda engine: engine.batch(2).generate(["a", [10**6]]), "prompts: element 1: "),
        (lambda engine: engine.batch(2).generate(["a", "b" * 9999]), "prompts: element 1: "),
        (lambda engine: engine.batch(2).generate(["a"], -1), "max_new_tokens: -1 is negative"),
        (lambda engine: engine.batch(2).generate(["a"], top_p=2.0), "top_p"),
    ],
)
def test_bad_calls(engine: Engine, call: object, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        call(engine)  # type: ignore[operator]


def test_engines_of_two_models_do_not_mix(engine: Engine, file: Path) -> None:
    other = Engine(file, threads=1)
    with pytest.raises(EngineError, match="turn 1: engine: has another model"):
        engine._step([(engine.share(1), [3]), (other, [3])])
    assert isinstance(engine.batch(1), Batch)
