"""Guesses change when a text is there, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import TEXT, random_model
from squat import forms
from squat.deploy.gguf import write_gguf
from squat.drafts import Drafts
from squat.engine import Engine
from squat.errors import EngineError

MODELS = {"4:8": {}, "8": {"activations": "8"}, "windows": {"windows": [8, 0]}}


@pytest.fixture(scope="module", params=MODELS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafts") / "model.gguf"
    write_gguf(path, random_model(3, layers=2, context=400, **MODELS[request.param]))
    return path


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    return Engine(file, threads=2)


@pytest.fixture(scope="module")
def plain(file: Path) -> Engine:
    return Engine(file, threads=1)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.sampled_from([TEXT, TEXT + TEXT, "ab" * 40, "a"]) | st.text("abc ", min_size=1),
    tokens=st.integers(0, 60),
    speculate=st.integers(1, 32),
    temperature=st.sampled_from([0.0, 0.2, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    stop=st.sampled_from([(), ("e", " a", "ab")]),
)
def test_a_text_is_what_it_is_without_guesses(
    engine: Engine, plain: Engine, prompt: str, tokens: int, speculate: int, temperature: float,
    penalty: float, stop: tuple[str, ...],
) -> None:  # fmt: skip
    options = {
        "temperature": temperature,
        "repetition_penalty": penalty,
        "stop": stop,
        "seed": 4,
        "logprobs": 2,
        "stream": True,
    }
    found = engine.generate(prompt, tokens, speculate=speculate, **options)
    expected = plain.generate(prompt, tokens, **options)
    assert "".join(found) == "".join(expected)
    assert found.logprobs == expected.logprobs
    assert np.array_equal(found.logits, expected.logits)
    for name in ("finish_reason", "new_tokens", "decoded_tokens"):
        assert getattr(found, name) == getattr(expected, name)
    assert engine.tokens == plain.tokens
    assert 0 <= found.accepted_tokens <= found.decoded_tokens
    # And the session goes on as it should.
    assert np.array_equal(engine.decode(7), plain.decode(7))


def test_forms_and_full_contexts(engine: Engine, plain: Engine) -> None:
    form = forms.regex("(ab,){5,30}")
    texts = [e.generate("ab,", 100, form=form, speculate=s) for e, s in ((engine, 8), (plain, 0))]
    assert texts[0] == texts[1]
    found = engine.generate(TEXT, None, speculate=8, stream=True)
    assert "".join(found) == plain.generate(TEXT, None)
    assert found.accepted_tokens > 20  # a random model that is greedy comes to repeat itself


def test_a_batch_needs_no_guesses(engine: Engine, plain: Engine) -> None:
    prompts = [TEXT, "ab" * 20]
    found = engine.batch(2).generate(prompts, 30, speculate=8)
    assert found == [plain.generate(prompt, 30) for prompt in prompts]


def test_what_is_guessed() -> None:
    drafts = Drafts([1, 2, 3, 9, 8, 1, 2], most=8)
    assert drafts.guess(room=10) == [3, 9]
    assert drafts.guess(room=1) == [3]
    assert drafts.guess(room=0) == []
    drafts.learn(right=2)
    assert drafts.guess(room=10) == [3, 9, 8, 1]
    drafts.push(7)
    assert drafts.guess(room=10) == []  # 2, 7 was never there
    # The longest that is the same says what follows, and of equal ones the last.
    drafts = Drafts([1, 2, 5, 3, 2, 6, 4, 2, 7, 1, 2], most=1)
    assert drafts.guess(room=10) == [5]
    assert Drafts([1, 2, 5, 1, 2, 6, 1, 2], most=1).guess(room=10) == [6]
    assert Drafts([], most=3).guess(room=10) == []


@pytest.mark.parametrize("speculate", [-1, 33])
def test_too_many_guesses(engine: Engine, speculate: int) -> None:
    with pytest.raises(EngineError, match=f"speculate: {speculate} is not from 0 to 32"):
        engine.generate("a", speculate=speculate)
