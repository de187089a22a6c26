"""Vectors and scores of texts: from the hidden states, in the engine and over HTTP with openai's client."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from chat_models import chat_file
from squat.engine import Engine
from squat.errors import EngineError
from squat.serving.app import Limits
from squat.serving.server import service_of

TEXTS = ["Once upon a time", "there was a girl.", "It's 1999, isn't it?"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("embeddings") / "tiny.gguf", context=100)


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    return Engine(file, threads=1)


@pytest.fixture(scope="module")
def http(file: Path) -> TestClient:
    return TestClient(service_of(str(file), None, Limits(body=20_000)).app())


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0
    )


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pooled_hidden_states(engine: Engine, pooling: Any) -> None:
    vectors = engine.embed(TEXTS, pooling=pooling)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, engine.info.hidden_size)
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = engine.hidden_states(engine.tokenize(text)).astype(np.float64)
        pooled = states[-1] if pooling == "last" else states.mean(axis=0)
        assert np.allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-7)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert (engine.embed([engine.tokenize(text)], pooling=pooling)[0] == vector).all()
    assert not np.allclose(vectors[0], vectors[1], atol=0.01)
    assert engine.embed([]).shape == (0, engine.info.hidden_size)


@settings(deadline=None, max_examples=20)
@given(texts=st.lists(st.text(min_size=1, max_size=20), max_size=4))
def test_a_vector_does_not_depend_on_the_others(engine: Engine, texts: list[str]) -> None:
    alone = [engine.embed([text])[0] for text in texts]
    assert np.array_equal(
        engine.embed(texts), np.array(alone).reshape(len(texts), engine.info.hidden_size)
    )


def test_a_score_is_the_sum_of_those_of_its_tokens(engine: Engine) -> None:
    for text, scores, total in zip(
        TEXTS, engine.score_tokens(TEXTS), engine.score(TEXTS), strict=True
    ):
        assert engine.detokenize(scores.tokens) == text
        assert sum(scores.logprobs) == pytest.approx(total, abs=1e-9)
        logits = engine.logits([1, *scores.tokens]).astype(np.float64)
        expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        assert scores.logprobs == pytest.approx(
            [expected[i, token] for i, token in enumerate(scores.tokens)], abs=1e-5
        )


BAD_CALLS: dict[str, Any] = {
    "texts: is one string": lambda e: e.embed("a"),
    "texts: element 1: tokens: there are none": lambda e: e.embed(["a", ""]),
    "texts: element 0: tokens: 1": lambda e: e.embed(["word " * 200]),
    "texts: element 1: ids: float64": lambda e: e.embed(["a", [1.5]]),
    "pooling: 'max' is unknown; choose mean or last": lambda e: e.embed(["a"], pooling="max"),
    "texts: element 0: text: ": lambda e: e.score_tokens(["\ud800"]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(engine: Engine, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        BAD_CALLS[message](engine)


def test_openai_s_client_gets_the_engine_s_vectors(client: openai.OpenAI, engine: Engine) -> None:
    expected = engine.embed(TEXTS)
    for given_input in (TEXTS, [engine.tokenize(text) for text in TEXTS]):
        for form in ({}, {"encoding_format": "float"}):  # base64 is what the client asks for
            found = client.embeddings.create(model="tiny", input=given_input, **form)
            assert np.array_equal(np.array([d.embedding for d in found.data], np.float32), expected)
            assert [d.index for d in found.data] == [0, 1, 2]
            tokens = sum(len(engine.tokenize(text)) for text in TEXTS)
            assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
            assert found.model == "tiny"
    for one in (TEXTS[0], engine.tokenize(TEXTS[0])):
        (data,) = client.embeddings.create(
            model="tiny", input=one, dimensions=engine.info.hidden_size, user="me"
        ).data
        assert np.array_equal(np.array(data.embedding, np.float32), expected[0])


def test_base64_is_of_little_endian_floats(http: TestClient, engine: Engine) -> None:
    body = {"input": "a", "encoding_format": "base64"}
    (data,) = http.post("/v1/embeddings", json=body).json()["data"]
    raw = base64.b64decode(data["embedding"])
    assert raw == engine.embed(["a"])[0].astype("<f4").tobytes()
    before = http.get("/metrics").text
    assert 'squat_requests_total{path="/v1/embeddings",status="200"}' in before


REFUSED: dict[str, dict[str, Any]] = {
    "input: Field required": {},
    "input: '': give a text or its token ids": {"input": ""},
    "input: []: ": {"input": []},
    "input: ['a', '']: ": {"input": ["a", ""]},
    "input: [1, 'a']: ": {"input": [1, "a"]},
    "input: [-1]: ": {"input": [-1]},
    "input: 5: ": {"input": 5},
    "input: token 5000 is outside the model's vocabulary": {"input": [[1, 5000]]},
    "input: has ": {"input": ["a", "word " * 200]},
    "dimensions: 3 is not supported; this model's vectors have": {"input": "a", "dimensions": 3},
    "encoding_format: 'int8': ": {"input": "a", "encoding_format": "int8"},
    "inputs: is unknown here": {"input": "a", "inputs": "b"},
    "text: ": {"input": "\ud800"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_request_is_refused_by_name(http: TestClient, message: str) -> None:
    answer = http.post("/v1/embeddings", content=json.dumps(REFUSED[message]))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"
    if message == "input: has ":
        assert error["code"] == "context_length_exceeded"


def test_a_text_without_tokens_is_refused(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "tokenize", lambda self, text: [])  # a normalizer may do that
    answer = http.post("/v1/embeddings", json={"input": "\u00ad"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("input: a text has no tokens")


def test_texts_that_take_too_long_are_refused(file: Path) -> None:
    http = TestClient(service_of(str(file), None, Limits(seconds=0.0)).app())
    answer = http.post("/v1/embeddings", json={"input": ["a", "b"]})
    assert answer.status_code == 400
    assert "send fewer at once" in answer.json()["error"]["message"]
