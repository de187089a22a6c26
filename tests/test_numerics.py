"""Joint 1: a fake-quantized value is code * scale, exactly; and LSQ's gradients are LSQ's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import some_ids, tiny_model
from squat.quantization import SquatConfig, quantize
from squat.quantization.levels import WEIGHT_LEVELS, snap_to
from squat.quantization.modules import QuantizedWeight
from squat.quantization.numerics import (
    MAX_STEP,
    MIN_STEP,
    code_range,
    fake_quantize,
    lsq_step,
    mse_step,
    quantize_codes,
    representable_step,
    row_codes,
    step_from_log,
)
from squat.quantization.quantizers import (
    QUANTIZERS,
    DorefaQuantizer,
    LearnedStepQuantizer,
    MinMaxQuantizer,
    NoiseQuantizer,
    PactQuantizer,
)

finite = st.floats(-1e4, 1e4, width=32)
values = st.lists(finite, min_size=1, max_size=40).map(lambda v: torch.tensor(v))
steps = st.floats(2**-13, 1000, width=32).map(lambda s: representable_step(torch.tensor([s])))
widths = st.sampled_from([(4, True), (8, True), (8, False), (2, True)])


@given(values, steps, widths)
def test_a_value_is_its_code_times_the_step(x, step, width):
    qmin, qmax = code_range(*width)
    codes = quantize_codes(x, step, qmin, qmax)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= qmin
    assert codes.max() <= qmax
    assert torch.equal(fake_quantize(x, step, qmin, qmax), codes * step)


@given(values, steps, widths)
def test_quantizing_twice_changes_nothing(x, step, width):
    once = fake_quantize(x, step, *code_range(*width))
    assert torch.equal(fake_quantize(once, step, *code_range(*width)), once)


@given(
    st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=40).filter(
        lambda row: max(row) >= 1e-30
    ),
    st.sampled_from([255, 15]),
)
def test_the_largest_of_a_row_has_the_largest_code(row, largest):
    x = torch.tensor([row, row[::-1]], requires_grad=True)
    codes, per_one = row_codes(x, largest)
    assert torch.equal(codes, codes.round())
    assert (codes.amax(-1) == largest).all()
    assert codes.min() >= 0
    assert ((codes / per_one - x).abs() <= x.amax(-1, keepdim=True) * (0.5001 / largest)).all()
    (codes / per_one).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@given(values, steps)
def test_the_error_is_at_most_half_a_step_inside_the_range(x, step):
    inside = x[(x.abs() < 127 * step).nonzero().flatten()]
    error = (fake_quantize(inside, step, -128, 127) - inside).abs()
    assert (error <= step / 2 * (1 + 1e-5) + 1e-30).all()


@given(values, steps, st.sampled_from([*WEIGHT_LEVELS, "8 bits"]))
def test_a_larger_value_has_no_smaller_code(x, step, name):
    levels = WEIGHT_LEVELS.get(name)
    snap = None if levels is None else snap_to(torch.tensor(levels))
    low, high = (
        code_range(4 if name == "uniform" else 8) if levels is None else levels[:: len(levels) - 1]
    )
    codes = quantize_codes(x.sort().values, step, low, high, snap)
    assert (codes.diff() >= 0).all()


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize_codes(x, torch.ones(1), -8, 7).tolist() == [0, 2, 2, 0, -2, -2]


@given(st.floats(-20, 15) | st.floats(allow_nan=False, width=32), st.booleans())
def test_steps_are_representable_in_fp16_whatever_an_update_does(log_step, coarse):
    step = step_from_log(torch.tensor([log_step]), coarse=coarse)
    assert torch.equal(step.half().float(), step)
    assert MIN_STEP <= step.item() <= MAX_STEP


EXTREMES = {
    "constant": torch.full((4, 64), 3.0),
    "zeros": torch.zeros(4, 64),
    "rows of zeros": torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    * torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
    "denormal": torch.full((4, 64), 1e-40),
    "an outlier": torch.cat([torch.full((1, 1), 1e4), torch.linspace(-1, 1, 255)[None]], 1).view(
        4, 64
    ),
    "the largest numbers": torch.full((4, 64), 3e38),
}


@pytest.mark.parametrize("x", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("shape", [(1,), (4, 1)], ids=["tensor", "row"])
@pytest.mark.parametrize("init", ["lsq", "mse"])
@pytest.mark.parametrize("name", [n for n in QUANTIZERS if "one-sided" not in n])
def test_extreme_tensors_have_steps_and_codes(name, init, shape, x):
    for levels in (None, WEIGHT_LEVELS["iq4_nl"]):
        quantizer = QUANTIZERS[name].weights(4, shape=shape, levels=levels).eval()
        quantizer.initialize(x, init)
        step = quantizer.step
        assert torch.isfinite(step).all()
        assert torch.equal(step.half().float(), step)
        assert (step >= MIN_STEP).all()
        found = quantizer(x)
        assert torch.equal(found, quantizer.codes(x) * step)
        assert torch.equal(found[x == 0], x[x == 0]) or levels  # levels need not have a zero


@given(steps, st.lists(st.floats(9, 1000), min_size=1, max_size=20), st.booleans())
def test_where_all_is_clipped_the_gradient_is_that_of_differences(step, quotients, negative):
    x = torch.tensor(quotients) * (-step if negative else step)
    at = step.double().log().float().requires_grad_()
    fake_quantize(x, at.exp(), -8, 7).sum().backward()
    little = 2.0**-6

    def clipped(change):
        return fake_quantize(x, step * (1 + change), -8, 7).double().sum()

    slope = (clipped(little) - clipped(-little)) / (2 * little)
    torch.testing.assert_close(at.grad.double().sum(), slope, rtol=1e-3, atol=1e-6)


@given(st.floats(MIN_STEP, 1000, width=32))
def test_a_step_survives_the_way_through_its_logarithm(step):
    step = representable_step(torch.tensor([step]))
    assert torch.equal(step_from_log(step.double().log().float()), step)


def lsq_reference(x, step, qmin, qmax, grad):
    """LSQ's gradients, written out as in the paper (Esser et al. 2020, eq. 3 and 5)."""
    v = x / step
    grad_x = torch.where((v >= qmin) & (v <= qmax), grad, 0.0)
    inside = v.round() - v
    d_step = torch.where(v < qmin, float(qmin), torch.where(v > qmax, float(qmax), inside))
    return grad_x, (d_step * grad).sum() / math.sqrt(x.numel() * qmax)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_lsq(bits):
    torch.manual_seed(bits)
    x = torch.randn(50, 7, requires_grad=True)
    grad = torch.randn(50, 7)
    quantizer = LearnedStepQuantizer(bits)
    quantizer.initialize(x, "lsq")
    quantizer(x).backward(grad)
    step = quantizer.step
    grad_x, grad_step = lsq_reference(x.detach(), step, quantizer.qmin, quantizer.qmax, grad)
    torch.testing.assert_close(x.grad, grad_x)
    # The parameter is the logarithm: d/d log(step) = step * d/d step.
    torch.testing.assert_close(quantizer.log_step.grad, (grad_step * step).reshape(1))


def test_each_token_gets_its_own_step_and_the_gradients_stay_apart():
    x = torch.randn(2, 3, 5)
    wide = torch.tensor([[True, False, True], [False, False, True]])[..., None]
    at_wide, at_narrow = (
        torch.tensor([0.01], requires_grad=True),
        torch.tensor([0.3], requires_grad=True),
    )
    mixed = fake_quantize(
        x,
        torch.where(wide, at_wide, at_narrow),
        torch.where(wide, -128, -8),
        torch.where(wide, 127, 7),
    )
    expected = torch.where(
        wide, fake_quantize(x, at_wide, -128, 127), fake_quantize(x, at_narrow, -8, 7)
    )
    assert torch.equal(mixed, expected)
    got = torch.autograd.grad(mixed.square().sum(), [at_wide, at_narrow])
    want = torch.autograd.grad(expected.square().sum(), [at_wide, at_narrow])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_step_is_no_worse_than_lsq_or_full_range(bits):
    torch.manual_seed(0)
    x = torch.randn(10_000) * torch.rand(10_000)
    qmin, qmax = code_range(bits)

    def error(step):
        return (fake_quantize(x, representable_step(step), qmin, qmax) - x).square().mean()

    best = error(mse_step(x[None], qmin, qmax))
    assert best <= error(lsq_step(x[None], qmax)) * 1.01
    assert best <= error(x.abs().max().reshape(1) / qmax)


def test_bf16_stays_bf16_and_the_arithmetic_is_float32():
    x = torch.randn(64).bfloat16()
    step = torch.tensor([0.0123]).half().float()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = fake_quantize(x, step, -128, 127)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, fake_quantize(x.float(), step, -128, 127).bfloat16())


def classes_of(name):
    """The quantizers of a method, for a weight and for activations, of 4 and of 8 bits."""
    row = QUANTIZERS[name]
    return [
        kind(bits, signed)
        for bits in (4, 8)
        for kind, signed in ((row.weights, True), (row.activations, not row.one_sided))
    ]


@pytest.mark.parametrize("name", QUANTIZERS)
@given(x=values, sample=values)
def test_every_method_evaluates_to_codes_times_an_fp16_step(name, x, sample):
    for quantizer in classes_of(name):
        quantizer.initialize(sample, "mse")
        step = quantizer.eval().step
        codes = quantizer.codes(x).float()
        assert torch.equal(step.half().float(), step)
        assert quantizer.qmin <= codes.min()
        assert codes.max() <= quantizer.qmax
        assert torch.equal(quantizer(x), codes * step)


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if "nipq" not in n])
def test_methods_that_round_do_so_while_training(name):
    x = torch.randn(300)
    for quantizer in classes_of(name):
        quantizer.initialize(x, "mse")
        trained = quantizer.train()(x)
        assert torch.equal(trained, quantizer.eval()(x))


@pytest.mark.parametrize("kind", [MinMaxQuantizer, DorefaQuantizer])
def test_the_min_max_step_clips_nothing_and_follows_the_tensor(kind):
    torch.manual_seed(0)
    x = torch.randn(1000)
    quantizer = kind(4)
    quantizer.initialize(x, "mse")
    target = x.tanh() if kind is DorefaQuantizer else x
    assert quantizer.step.item() == pytest.approx(target.abs().max().item() / 7, rel=1e-3)
    assert quantizer.codes(x).abs().max() == 7
    for _ in range(200):
        quantizer(3 * x)
    expected = quantizer.transform(3 * x).abs().max().item() / 7
    assert quantizer.step.item() == pytest.approx(expected, rel=1e-2)
    frozen = quantizer.eval().step
    quantizer(100 * x)
    assert torch.equal(quantizer.step, frozen)
    assert not any(p.requires_grad for p in quantizer.parameters())


def test_a_min_max_step_of_one_width_sees_the_tokens_of_that_width_only():
    quantizer = MinMaxQuantizer(4)
    quantizer.initialize(torch.ones(1), "mse")
    x = torch.tensor([[7.0], [700.0]])
    for _ in range(300):
        quantizer.step_for(x, torch.tensor([[True], [False]]))
    assert quantizer.step.item() == pytest.approx(1, rel=1e-3)
    quantizer.step_for(x, torch.tensor([[False], [False]]))
    assert quantizer.step.item() == pytest.approx(1, rel=1e-3)


def test_dorefas_weights_are_tanh_scaled_by_their_largest():
    w = torch.tensor([-2.0, -0.5, 0.0, 0.1, 1.0])
    quantizer = DorefaQuantizer(4)
    quantizer.initialize(w, "mse")
    normalised = w.tanh() / w.tanh().abs().max()
    assert quantizer.codes(w).tolist() == (normalised * 7).round().tolist()


@given(values, steps, st.booleans())
def test_pacts_clip_learns_from_what_it_clips_and_nothing_else(x, step, signed):
    x.requires_grad_()
    step = step.clone().requires_grad_()
    qmin, qmax = code_range(4, signed)
    PactQuantizer(4).quantize(x, step, qmin, qmax).sum().backward()
    below, above = x < qmin * step, x > qmax * step
    inside = (x > qmin * step) & (x < qmax * step)
    assert (x.grad[below | above] == 0).all()
    assert (x.grad[inside] == 1).all()
    edge = ~(below | above | inside)  # what lies on the clip itself may count or not
    expected = (qmin * below.sum() + qmax * above.sum()).item()
    assert abs(step.grad.item() - expected) <= 8 * edge.sum() + 1e-3 * abs(expected)


@given(values, steps, st.booleans())
def test_nipqs_noise_is_that_of_rounding_and_stays_inside_of_the_clip(x, step, signed):
    qmin, qmax = code_range(4, signed)
    noisy = NoiseQuantizer(4).train().quantize(x, step, qmin, qmax)
    scaled = x * step.reciprocal()
    clipped = (scaled <= qmin) | (scaled >= qmax)
    assert torch.equal(noisy[clipped], (scaled.clamp(qmin, qmax) * step)[clipped])
    rounding = step.item() / 2 * (1 + 1e-5) + 1e-30
    assert ((noisy - x)[~clipped].abs() <= rounding + x[~clipped].abs() * 1e-6).all()


def test_nipqs_noise_has_the_distribution_of_the_rounding_error_but_not_its_places():
    torch.manual_seed(0)
    x, step = torch.rand(50_000) ** 3 * 3, torch.ones(1)
    noise = NoiseQuantizer(4).train().quantize(x, step, -8, 7) - x
    error = x.round() - x
    quantiles = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(
        noise.quantile(quantiles), error.quantile(quantiles), atol=0.02, rtol=0
    )
    assert torch.corrcoef(torch.stack([noise, error]))[0, 1].abs() < 0.02


def test_nipqs_gradients_are_those_of_noise_and_clipping():
    torch.manual_seed(0)
    x = (torch.randn(200) * 4).requires_grad_()
    step = torch.full((1,), 0.5, requires_grad=True)
    noisy = NoiseQuantizer(4).train().quantize(x, step, -8, 7)
    noisy.sum().backward()
    inside = (x > -4) & (x < 3.5)
    assert torch.equal(x.grad, inside.float())
    noise = (noisy - x) / step
    expected = noise[inside].sum() - 8 * (x <= -4).sum() + 7 * (x >= 3.5).sum()
    torch.testing.assert_close(step.grad[0], expected)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_method_keeps_bf16(name):
    x = torch.randn(64).bfloat16()
    for quantizer in classes_of(name):
        quantizer.initialize(x, "mse")
        assert quantizer(x).dtype == torch.bfloat16
        assert quantizer.eval()(x).dtype == torch.bfloat16


def trained_codes(bfloat16, steps):
    """All codes of a small model's weights after some steps of training."""
    model = quantize(tiny_model(), SquatConfig(), calibration=[some_ids(4, 32)]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for step in range(steps):
        ids = some_ids(1, 16, seed=step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    return torch.cat([weight.codes().flatten() for weight in weights])


def test_training_in_bfloat16_moves_the_codes_that_float32_moves():
    before, exact, rounded = (trained_codes(*how) for how in ((False, 0), (False, 20), (True, 20)))
    assert (exact != before).float().mean() > 0.005
    assert (exact != rounded).float().mean() < 0.001
