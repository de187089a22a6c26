"""Data-free corpora: the model's own text, deterministic, resumable and cached."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from squat.data import generate_text, generate_tokens, generated, train_tokenizer
from squat.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(generate_text(300, seed=0), vocab_size=300)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, cache: Path, **changes: int
) -> np.ndarray:
    settings = {"tokens": 70, "seed": 0, "sequence_length": 8, "batch_size": 2, **changes}
    return generate_tokens(model, tokenizer, cache=cache, **settings)


def test_whole_sequences_that_start_with_bos(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokens = generate(model, tokenizer, tmp_path)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.shape == (9 * 8,)
    assert (tokens.reshape(9, 8)[:, 0] == 1).all()
    assert len(np.unique(tokens)) > 10


def test_the_same_settings_give_the_same_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = generate(model, tokenizer, tmp_path / "a")
    assert np.array_equal(first, generate(model, tokenizer, tmp_path / "b"))
    assert not np.array_equal(first, generate(model, tokenizer, tmp_path / "b", seed=1))


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = generate(model, tokenizer, tmp_path / "whole")
    batches = 0
    sample_texts = generated.sample_texts

    def two_batches(*arguments: object) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return sample_texts(*arguments)

    monkeypatch.setattr(generated, "sample_texts", two_batches)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, tmp_path / "parts")
    (partial,) = (tmp_path / "parts").glob("*.partial")
    with partial.open("ab") as out:
        out.write(b"half a batch")
    assert np.array_equal(generate(model, tokenizer, tmp_path / "parts"), whole)
    assert batches == 6  # two before, one interrupted, three after: none twice
    assert not partial.exists()


def test_finished_text_is_not_made_again(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = generate(model, tokenizer, tmp_path)
    monkeypatch.setattr(generated, "sample_texts", lambda *_: pytest.fail("generated twice"))
    assert np.array_equal(generate(model, tokenizer, tmp_path), first)


def test_other_weights_make_another_file(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    generate(model, tokenizer, tmp_path)
    other = LlamaForCausalLM(model.config)
    generate(other, tokenizer, tmp_path)
    assert len(list(tmp_path.glob("generated-*.uint16"))) == 2


def test_after_the_first_token_comes_the_most_likely_one(model: LlamaForCausalLM) -> None:
    model.eval()
    ids = generated.sample_texts(model, 9, 24, 1, None, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        best = model(input_ids=ids).logits.argmax(-1)  # without a KV cache
    for row in range(9):
        greedy = generated.GREEDY[row % 3]
        assert torch.equal(ids[row, 2 : 2 + greedy], best[row, 1 : 1 + greedy])
    assert not torch.equal(ids[:, 7:], best[:, 6:-1])


def test_after_the_end_of_a_text_comes_the_next(model: LlamaForCausalLM) -> None:
    free = generated.sample_texts(model, 8, 24, 1, None, torch.Generator().manual_seed(0))
    eos = int(free[:, 2:12].flatten().mode().values)
    ids = generated.sample_texts(model, 8, 24, 1, eos, torch.Generator().manual_seed(0))
    ended = ids[:, :-1] == eos
    assert ended.any()
    assert (ids[:, 1:][ended] == 1).all()


def test_the_mode_of_the_model_is_restored(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model.train()
    generate(model, tokenizer, tmp_path)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 25}, "sequence_length 25 is not between 2 and the model's context"),
        ({"sequence_length": 1}, "sequence_length 1 is not between"),
        ({"tokens": 0}, "tokens is 0"),
    ],
)
def test_what_cannot_be_generated(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    changes: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        generate(model, tokenizer, tmp_path, **changes)
