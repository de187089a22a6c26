"""Joint 1: a fake-quantized value is code * scale, exactly; and LSQ's gradients are LSQ's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat.quantize.numerics import (
    MAX_STEP,
    MIN_STEP,
    code_range,
    fake_quantize,
    lsq_step,
    mse_step,
    quantize_codes,
    representable_step,
    step_from_log,
)
from squat.quantize.quantizers import LearnedStepQuantizer

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


@given(values, steps)
def test_the_error_is_at_most_half_a_step_inside_the_range(x, step):
    inside = x[(x.abs() < 127 * step).nonzero().flatten()]
    error = (fake_quantize(inside, step, -128, 127) - inside).abs()
    assert (error <= step / 2 * (1 + 1e-5) + 1e-30).all()


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize_codes(x, torch.ones(1), -8, 7).tolist() == [0, 2, 2, 0, -2, -2]


@given(st.floats(-20, 15))
def test_steps_are_representable_in_fp16(log_step):
    step = step_from_log(torch.tensor([log_step]))
    assert torch.equal(step.half().float(), step)
    assert MIN_STEP <= step.item() <= MAX_STEP


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

    best = error(mse_step(x, qmin, qmax))
    assert best <= error(lsq_step(x, qmax)) * 1.01
    assert best <= error(x.abs().max().reshape(1) / qmax)


def test_bf16_stays_bf16_and_the_arithmetic_is_float32():
    x = torch.randn(64).bfloat16()
    step = torch.tensor([0.0123]).half().float()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = fake_quantize(x, step, -128, 127)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, fake_quantize(x.float(), step, -128, 127).bfloat16())
