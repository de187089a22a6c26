"""The losses against their formulas, and the trainer: accumulation, resuming, logs, bad input."""

import json
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, TrainingArguments

from models import PUBLISHED, quantized_model, some_ids, tiny_model
from squat.data import PackedDataset
from squat.distill import LossConfig, SquatTrainer, losses
from squat.distill.losses import distillation, distribution, entropy
from squat.errors import CheckpointError, ConfigError
from squat.quantization import SquatConfig
from squat.quantization.modules import QuantizedWeight
from squat.quantization.quantizers import QUANTIZERS


def test_distillation_is_the_formula_per_token():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    counted = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    per_token = (p * (p.log() - q.log())).sum(-1)
    expected = 4 * per_token[counted].mean()
    torch.testing.assert_close(distillation(student, teacher, 2.0, counted), expected)
    assert distillation(teacher, teacher, 2.0, counted).abs() < 1e-6
    # Per token: twice the text, the same value.
    twice = distillation(student.repeat(2, 1), teacher.repeat(2, 1), 2.0, counted.repeat(2))
    torch.testing.assert_close(twice, expected)


@pytest.mark.parametrize("top_k", [2, 5, 11, 1000])
def test_distillation_of_the_most_probable_entries_knows_no_others(top_k):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    counted = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    kept = teacher >= teacher.sort(descending=True).values[:, min(top_k, 11) - 1 : min(top_k, 11)]
    alone = [torch.where(kept, x, -torch.inf).softmax(-1) for x in (teacher / 2, student / 2)]
    per_token = torch.special.xlogy(alone[0], alone[0] / alone[1]).nansum(-1)
    student.requires_grad_()
    found = distillation(student, teacher, 2.0, counted, top_k)
    torch.testing.assert_close(found, 4 * per_token[counted].mean())
    found.backward()
    assert ((student.grad != 0) == (kept & counted[:, None])).all()


@pytest.mark.parametrize("at_once", [1, 25, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_pytorch_however_many_tokens_at_once(
    monkeypatch, at_once, dtype
):
    monkeypatch.setattr(losses, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    teacher, labels = torch.randn(7, 11, dtype=dtype), torch.randint(0, 11, (7,))
    labels[2] = -100
    counted = labels != -100

    def gradient(loss_of):
        logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
        loss = 0.25 * loss_of(logits.requires_grad_())
        loss.backward()
        return loss.detach(), logits.grad

    def kl(logits):
        log_p, log_q = (F.log_softmax(x[counted].float() / 2, -1) for x in (teacher, logits))
        return 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    pairs = [
        (lambda x: losses.cross_entropy(x, labels), lambda x: F.cross_entropy(x.float(), labels)),
        (lambda x: distillation(x, teacher, 2.0, counted), kl),
    ]
    for ours, theirs in pairs:
        (loss, grad), (expected, expected_grad) = gradient(ours), gradient(theirs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, expected_grad)
        assert (grad[2] == 0).all()


def test_entropy_rewards_the_product_of_variances():
    torch.manual_seed(0)
    queries = [torch.randn(2, 4, 8, 6) for _ in range(3)]
    keys = [torch.randn(2, 2, 8, 6) for _ in range(3)]
    total = 0.0
    for q, k in zip(queries, keys, strict=True):
        for head in range(4):
            total += torch.log1p(q[:, head].var() * k[:, head // 2].var())
    torch.testing.assert_close(entropy(queries, keys), -torch.log(total))
    assert entropy([2 * q for q in queries], keys) < entropy(queries, keys)


def test_distribution_loss_brings_maps_together_and_the_published_sign_apart():
    torch.manual_seed(0)
    teacher = [torch.randn(2, 4, 5, 5).softmax(-1) for _ in range(2)]
    other = [torch.randn(2, 4, 5, 5).softmax(-1) for _ in range(2)]
    assert distribution(teacher, teacher, False).abs() < 1e-6
    assert distribution(other, teacher, False) > distribution(teacher, teacher, False)
    assert distribution(other, teacher, True) < distribution(teacher, teacher, True)
    cosine = torch.stack(
        [
            F.cosine_similarity(o.flatten(2), t.flatten(2), dim=-1).mean()
            for o, t in zip(other, teacher, strict=True)
        ]
    ).mean()
    torch.testing.assert_close(distribution(other, teacher, False), -cosine.log())


def trainer(
    folder,
    steps=6,
    batch=4,
    accumulate=1,
    config=None,
    teachers=None,
    loss=None,
    freeze=False,
    name="llama",
    **overrides,
):
    tokens = some_ids(1, 4000)[0].numpy().astype("uint16")
    model = quantized_model(name, config)
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        logging_steps=2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **overrides,
    )
    dataset = PackedDataset(tokens, 16, steps * batch * accumulate, seed=0)
    teachers = [tiny_model(name)] if teachers is None else teachers
    return SquatTrainer(model, teachers, args, dataset, loss=loss, freeze=freeze)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("bf16", [False, True])
def test_training_moves_towards_the_teacher_and_logs_every_term(tmp_path, bf16):
    # Cross-entropy on random tokens and a full entropy loss would pull away from a random teacher. Steps
    # as LSQ starts them leave something to learn.
    config = SquatConfig(**{**PUBLISHED, "activation_levels": "table"}, init="lsq")
    run = trainer(tmp_path, steps=30, config=config, loss=LossConfig(gamma=1), bf16=bf16)
    before = weights(run.model)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    for term in ("ce", "kl", "entropy", "distribution", "wide_share"):
        assert all(term in entry for entry in logs)
    # Batches differ by more than a few steps bring: the mean of the last five logs.
    assert mean(entry["kl"] for entry in logs[-5:]) < logs[0]["kl"]
    assert 0.3 < logs[-1]["wide_share"] < 0.7
    after = weights(run.model)
    # Everything learns: weights, every step size, and the thresholds follow. Levels and ranks stay.
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.endswith(("levels", "ranks"))}
    # The log adds up to the loss (to rounding of the log itself).
    config, last = run.loss_config, logs[-1]
    total = last["kl"]
    total += config.entropy * last["entropy"] + config.distribution * last["distribution"]
    assert last["loss"] == pytest.approx(total, abs=2e-2)


@pytest.mark.parametrize("policy", ["threshold", pytest.param("topk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_every_method_trains_with_every_policy(tmp_path, method, policy):
    config = SquatConfig(method=method, policy=policy, **PUBLISHED)
    run = trainer(tmp_path, steps=16, config=config, loss=LossConfig(gamma=1))
    before = weights(run.model)
    run.train()
    logs = [entry["kl"] for entry in run.state.log_history if "loss" in entry]
    assert min(logs[-3:]) < logs[0]
    after = weights(run.model)
    still = {name for name in before if torch.equal(before[name], after[name])}
    if "pact" in method:  # a clip that clips nothing learns nothing
        still = {name for name in still if not name.endswith("log_step")}
    assert not {name for name in still if not name.endswith(("threshold", "levels", "ranks"))}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, caplog):
    whole = trainer(tmp_path / "whole")
    whole.train()
    interrupted = trainer(tmp_path / "interrupted")
    interrupted.train()  # leaves checkpoints at steps 3 and 6
    resumed = trainer(tmp_path / "interrupted")
    with caplog.at_level("WARNING", "transformers"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "interrupted/checkpoint-3"))
    assert "missing keys" not in caplog.text
    expected, got = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def quantized_weights(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_frozen_codes_stand_still_while_steps_and_norms_learn(tmp_path, name):
    only_kl = LossConfig(gamma=1, entropy=0, distribution=0)
    config = SquatConfig(activation_bits=8, init="lsq", weight_levels="uniform")
    run = trainer(tmp_path, 40, freeze=True, name=name, config=config, loss=only_kl)
    ids = some_ids(8, 16)
    with torch.no_grad():
        wanted = run.teachers[0](input_ids=ids).logits.log_softmax(-1)

    def kl():
        with torch.no_grad():
            got = run.model.eval()(input_ids=ids).logits.log_softmax(-1)
        return F.kl_div(got, wanted, log_target=True, reduction="sum")

    before, start = weights(run.model), kl()
    codes = {n: m.codes() for n, m in quantized_weights(run.model).items()}
    run.train()
    assert kl() < start
    run.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    after = weights(loaded)
    moved = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    for module_name, module in quantized_weights(loaded).items():
        assert torch.equal(module.codes(), codes[module_name])
        steps, rare = f"{module_name}.weight_quantizer.log_step", module_name.split(".")[-1]
        assert (steps in moved) == (rare not in ("embed_tokens", "lm_head", "wte", "wpe"))
    assert {n for n in before if "norm" in n or "ln_" in n} <= moved
    with torch.no_grad():
        trained = run.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, trained)


def test_frozen_codes_resume_exactly_and_need_steps_that_learn(tmp_path):
    whole = trainer(tmp_path, freeze=True)
    whole.train()
    resumed = trainer(tmp_path, freeze=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for run in (whole, resumed):
        run.save_model(str(tmp_path / "model"))
    expected, got = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"codes: .* has no step that is learned"):
        trainer(tmp_path, freeze=True, config=SquatConfig(method="minmax", **PUBLISHED))


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    # Without the terms that are logarithms of a mean over the batch, the split must not matter. Float
    # widths, because a threshold moves once per forward pass.
    loss, config = LossConfig(entropy=0, distribution=0), SquatConfig(activation_bits=8)
    large = trainer(tmp_path / "a", steps=2, batch=8, config=config, loss=loss)
    small = trainer(tmp_path / "b", steps=2, batch=2, accumulate=4, config=config, loss=loss)
    large.train(), small.train()
    first = large.state.log_history[0]["grad_norm"]
    assert small.state.log_history[0]["grad_norm"] == pytest.approx(first, rel=0.05)
    assert small.state.log_history[0]["loss"] == pytest.approx(
        large.state.log_history[0]["loss"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("reentrant", "loss"), [(False, None), (True, LossConfig(entropy=0, distribution=0))]
)
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant, loss):
    """A layer that is computed twice decides the same widths twice, and its threshold moves once."""

    def one_step(folder, **options):
        run = trainer(tmp_path / folder, steps=1, loss=loss, **options)
        gradients = {}
        for name, parameter in run.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
            )
        return run.train().training_loss, gradients, weights(run.model)

    value, gradients, after = one_step("plain")
    value2, gradients2, after2 = one_step(
        "checkpointed",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert value2 == value
    assert gradients2.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradients2[name], gradient), name
    assert all(torch.equal(after2[name], tensor) for name, tensor in after.items())


def test_checkpointing_that_hides_the_attention_maps_is_refused(tmp_path):
    run = trainer(
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ConfigError, match="use_reentrant"):
        run.train()


def test_teachers_are_averaged(tmp_path):
    run = trainer(tmp_path, teachers=[tiny_model(seed=1), tiny_model(seed=2)])
    ids = some_ids()
    got, maps = run._ask_teachers({"input_ids": ids})
    with torch.no_grad():
        expected = (tiny_model(seed=1)(ids).logits + tiny_model(seed=2)(ids).logits) / 2
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert len(maps) == 3


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    save = torch.save

    def full_after_the_first(*args, **kwargs):
        if (tmp_path / "checkpoint-3" / "trainer_state.json").exists():
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full_after_the_first)
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*No space left.*intact"):
        run.train()
    assert not (tmp_path / "checkpoint-6").exists()
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_what_cannot_be_trained_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    dataset = PackedDataset(some_ids(1, 100)[0].numpy(), 16, 8, seed=0)
    student = quantized_model()
    with pytest.raises(ConfigError, match="not quantized"):
        SquatTrainer(tiny_model(), [tiny_model()], args, dataset)
    with pytest.raises(ConfigError, match="none given"):
        SquatTrainer(student, [], args, dataset)
    with pytest.raises(ConfigError, match="shares its config object"):
        SquatTrainer(student, [type(student)(student.config)], args, dataset)
    with pytest.raises(ConfigError, match="vocabulary of 50"):
        SquatTrainer(student, [tiny_model(vocab_size=50)], args, dataset)
    with pytest.raises(ConfigError, match=r"layers and heads \(3, 4\)"):
        SquatTrainer(student, [tiny_model(num_hidden_layers=2)], args, dataset)
    SquatTrainer(
        student, [tiny_model(num_hidden_layers=2)], args, dataset, loss=LossConfig(distribution=0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, "4:8"])
def test_torch_compile_sees_the_whole_model_as_one_graph(bits):
    config = SquatConfig(activation_bits=bits)
    model = quantized_model(config=config).train()
    model.token_state.record = True
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(input_ids=some_ids(4, 16), use_cache=False)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
