"""Output that is held to a form: whatever model and tokenizer, and however wild the sampling."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine_models import random_model
from squat.deploy.gguf import write_gguf
from squat.engine import Engine
from squat.errors import EngineError
from squat.forms import choice, json_schema, regex
from tokenizer_kinds import KINDS

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.org$"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "an object": PERSON,
    "a list": {"type": "array", "items": {"enum": ["red", "grün", 3, None]}, "maxItems": 4},
    "nested": {
        "type": "object",
        "properties": {
            "people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
            "sure": {"type": "boolean"},
        },
        "required": ["people", "sure"],
        "additionalProperties": False,
    },
    "either": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5}]},
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": -99, "maximum": 99},
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value", "left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
}


def engine_of(kind: str, folder: Path) -> Engine:
    """A random model with a tokenizer of this kind."""
    path = folder / f"{kind.replace(' ', '-')}.gguf"
    tokenizer = KINDS[kind]()
    ends = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special][:1]
    model = random_model(tokenizer_json=tokenizer.to_str(), context=600)
    write_gguf(path, replace(model, eos_token_ids=ends or [2]))
    return Engine(path, threads=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of("smollm", tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hundred_wild_answers_satisfy_their_schema(engine: Engine, name: str) -> None:
    schema = SCHEMAS[name]
    form, texts = json_schema(schema), set()
    for seed in range(100):
        answer = engine.generate("Say", None, temperature=1.5, seed=seed, form=form, stream=True)
        text = "".join(answer)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(text), schema)
        assert "\n" not in text
        texts.add(text)
    assert len(texts) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_keeps_to_an_expression(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    pattern = r"[a-e]{1,6}(,[a-e]{2,4})?[.]"
    for seed in range(8):
        text = engine.generate("a", None, temperature=2.0, seed=seed, form=regex(pattern))
        assert re.fullmatch(pattern, text), text


def test_of_texts_the_more_probable_one_is_chosen(engine: Engine) -> None:
    logits = engine.logits(engine.tokenize("The dog"))[-1]
    letters = [c for c in "abcdefgh" if len(engine.tokenize(c)) == 1]
    by_letter = {c: logits[engine.tokenize(c)[0]] for c in letters}
    assert engine.generate("The dog", form=choice(letters)) == max(
        letters, key=by_letter.__getitem__
    )
    odd = ["a|b", "(c)", "x.y\\z", "ü é/“", "tab\there", "-]^", ""]
    told = {
        engine.generate("The dog", temperature=3.0, seed=s, form=choice(odd)) for s in range(60)
    }
    assert told <= set(odd)
    assert len(told) > 3


def test_what_is_cut_short_is_a_beginning_and_log_probabilities_are_the_models(
    engine: Engine,
) -> None:
    form = json_schema({"type": "object"})
    answer = engine.generate("Say", 3, form=form, logprobs=0, stream=True)
    text = "".join(answer)
    assert answer.finish_reason == "length"
    assert text.startswith("{")
    logits = engine.logits(engine.tokenize("Say"))[-1].astype(np.float64)
    first = answer.logprobs[0]
    expected = logits[first.token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert first.logprob == pytest.approx(expected)
    # A session goes on without the form.
    assert engine.generate("Say", 8) == Engine(engine._path, threads=1).generate("Say", 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regex("(?=a)b"), "invalid regex"),
        (lambda: regex("("), "invalid regex"),
        (lambda: choice([]), "no texts to choose from"),
        (lambda: json_schema({"type": "fish"}), "Invalid type: fish"),
        (lambda: json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (lambda: json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: json_schema({"default": {1}}), "the schema is no JSON"),
        (lambda: json_schema(["a"]), r"\['a'\] is no schema; give an object"),  # type: ignore[arg-type]
    ],
)
def test_forms_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(EngineError, match=f"^form: .*{message}"):
        make()


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match=r"pip install 'squat\[forms\]'"):
        regex("a")
