"""Every architecture with a row in the site table, in a tiny random shape, through the whole way."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from models import ARCHITECTURES, some_ids, tiny_model
from squat.architectures import ARCHITECTURES as ROWS
from squat.data import PackedDataset
from squat.distill import SquatTrainer
from squat.errors import ConfigError
from squat.quantization import SquatConfig, quantize


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request, tmp_path_factory):
    """A 4:8 model after one step with every loss, its teacher, and the step's log."""
    teacher = tiny_model(request.param)
    model = quantize(tiny_model(request.param), SquatConfig(), calibration=[some_ids(8, 32)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    tokens = some_ids(1, 400)[0].numpy().astype("uint16")
    run = SquatTrainer(model, [teacher], args, PackedDataset(tokens, 24, 4, seed=0))
    run.train()
    return model.eval(), before, run.state.log_history[0]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def test_one_step_trains_everything_with_every_loss(trained):
    model, before, log = trained
    assert all(log[term] != 0 for term in ("ce", "kl", "entropy", "distribution"))
    assert 0 < log["wide_share"] < 1
    after = model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    # A threshold may rest on a first token, whose importance is 1 whatever the weights.
    constants = ("threshold", "levels", "ranks", "center")
    assert {name for name in still if not name.endswith(constants)} == set()
    assert all(value.isfinite().all() for value in after.values())


def test_a_checkpoint_gives_the_same_logits(trained, tmp_path):
    model, *_ = trained
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))


def test_a_later_token_never_changes_an_earlier_logit(trained):
    model, *_ = trained
    ids = some_ids()
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 11) % 90 + 3
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15], after[:, 15])


@pytest.mark.parametrize("chunks", [[1] * 24, [5, 11, 8]], ids=["tokens", "chunks"])
def test_with_a_cache_the_logits_are_the_same_bits(trained, chunks):
    model, *_ = trained
    ids, cache, pieces = some_ids(), None, []
    for piece in ids.split(chunks, dim=1):
        with torch.no_grad():
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert torch.equal(torch.cat(pieces, dim=1), logits(model, ids))


def test_generation_with_a_cache_is_generation_without(trained):
    model, *_ = trained
    kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(some_ids(2, 8), **kwargs)
    without = model.generate(some_ids(2, 8), use_cache=False, **kwargs)
    assert with_cache.shape == (2, 28)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("model_type", ["bloom", "gemma", "gemma2"])
def test_an_architecture_without_a_row_is_refused_with_the_list(model_type):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        num_hidden_layers=1,
    )
    known = ", ".join(ROWS)
    with pytest.raises(ConfigError, match=f"{model_type!r} has no row.*{known}"):
        quantize(AutoModelForCausalLM.from_config(config))


def test_every_row_is_tested():
    assert {name.split("-")[0] for name in ARCHITECTURES} == set(ROWS)
