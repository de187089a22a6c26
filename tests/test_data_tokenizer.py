"""The byte-level BPE tokenizer: its structure, its losslessness, and the check against a model."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from squat.data import check_tokenizer, generate_text, train_tokenizer
from squat.data.tokenizer import first_token
from squat.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(generate_text(1000, seed=0), vocab_size=600)


def structure(tokenizer: dict) -> dict:
    """A tokenizer.json without what training determines, and what is put around a text."""
    model = {k: v for k, v in tokenizer["model"].items() if k not in ("vocab", "merges")}
    return {**tokenizer, "model": model, "post_processor": None}


def test_special_tokens_and_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 600


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_nothing_is_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(text, add_special_tokens=False).ids
    normalized = backend.normalizer.normalize_str(text)  # NFKC of the library's year of Unicode
    if "<" not in text:  # or it may spell a special token
        assert backend.decode(ids, skip_special_tokens=False).removeprefix(" ") in (
            normalized,
            normalized.removeprefix(" "),
        )


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(generate_text(1000, seed=0), vocab_size=600)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_saved_tokenizer_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The boys who like Anna don't sleep."
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.bos_token_id == 1
    ids = tokenizer(text).input_ids
    assert ids[0] == 1  # as in front of every line of training text
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


@pytest.mark.skipif("SQUAT_DATA" not in os.environ, reason="SQUAT_DATA is not set")
def test_structure_is_that_of_the_papers_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    models = Path(os.environ["SQUAT_DATA"]).parent / "models"
    theirs = json.loads((models / "babylm-tokenizer-16000.json").read_text("utf-8"))
    ours = json.loads(tokenizer.backend_tokenizer.to_str())
    assert structure(ours) == structure(theirs)


def test_no_text_to_train_on() -> None:
    with pytest.raises(DataError, match="no text to train on"):
        train_tokenizer(iter([]), vocab_size=600)


def test_a_vocabulary_too_small_for_the_bytes() -> None:
    with pytest.raises(DataError, match="vocab_size 258 is below 259"):
        train_tokenizer(["text"], vocab_size=258)


def test_a_tokenizer_beyond_the_models_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, 600)
    check_tokenizer(tokenizer, 1000)
    with pytest.raises(DataError, match=r"has id 599, but the model's vocab_size is 599"):
        check_tokenizer(tokenizer, 599)


def test_eos_stands_in_for_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    with_eos = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    check_tokenizer(with_eos, 600)
    assert (first_token(tokenizer), first_token(with_eos)) == (1, 2)
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(DataError, match="neither bos_token nor eos_token is set"):
        check_tokenizer(bare, 600)
