"""Token steps: what a vector multiplies its step by, its largest magnitude or a power of two."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat.quantization import SquatConfig
from squat.quantization.modules import SiteQuantizer
from squat.quantization.numerics import (
    peak_multiplier,
    power_of_two,
    representable_step,
    token_exponent,
)

magnitudes = st.floats(2.0**-40, 2.0**60, width=32)


@given(st.lists(magnitudes, min_size=1, max_size=8), magnitudes)
def test_the_exponent_is_the_smallest_that_reaches(values, limit):
    x, reach = torch.tensor(values), torch.tensor([limit])
    e = token_exponent(x, reach).item()
    peak = max(abs(v) for v in x.tolist())
    assert 0 <= e <= 31
    assert peak <= math.ldexp(reach.item(), e) or e == 31
    assert e == 0 or peak > math.ldexp(reach.item(), e - 1)


@given(st.integers(-126, 127))
def test_powers_of_two_are_exact(exponent):
    assert power_of_two(torch.tensor(exponent)).item() == 2.0**exponent


def test_nothing_and_infinity_have_exponents():
    x = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [1.0, -5.0]])
    assert token_exponent(x, torch.tensor([2.0])).flatten().tolist() == [0, 31, 2]


def is_multiplier(x):
    mantissa, power = math.frexp(x)
    return mantissa * 8 in (4, 5, 6, 7) and -32 <= power - 1 <= 31


@given(st.lists(magnitudes, min_size=1, max_size=8))
def test_the_multiplier_is_the_smallest_whose_128_fold_reaches(values):
    multiplier = peak_multiplier(torch.tensor(values)).item()
    peak = max(values)
    assert is_multiplier(multiplier)
    assert peak <= 128 * multiplier or multiplier == 1.75 * 2.0**31
    mantissa, power = math.frexp(multiplier)
    smaller = math.ldexp(mantissa - 1 / 8 if mantissa > 0.5 else 7 / 16, power)
    assert peak > 128 * smaller or multiplier == 2.0**-32


def test_nothing_and_infinity_have_multipliers():
    x = torch.tensor([[0.0, -0.0], [torch.inf, 1.0], [1.0, -128.0], [128.5, 3.0]])
    assert peak_multiplier(x).flatten().tolist() == [2.0**-32, 1.75 * 2.0**31, 1.0, 1.25]


@given(st.floats(2.0**-14, 65504.0, width=32))
def test_coarse_steps_multiply_exactly(value):
    step = representable_step(torch.tensor([value]), coarse=True)
    assert step.half().float().equal(step)
    assert abs(step.item() - value) <= 2.0**-9 * value or step.item() == 65408.0
    for multiplier in (1.25, 1.75):
        for other in (65504.0, 65408.0 * 1.75):  # of a weight, and of another token
            exact = step.double() * multiplier * other
            assert (step * multiplier * other).double().equal(exact)


def site(bits, **settings):
    alike = {"hadamard": (), "activation_levels": "uniform", "wide_first_token": False}
    config = SquatConfig(activation_bits=bits, **alike, **settings)
    return SiteQuantizer("mlp_mid", 0, config)


def calibrated(quantizer, x):
    quantizer.start_collecting()
    quantizer(x)
    quantizer.initialize("mse")
    return quantizer.eval()


def test_a_few_huge_tokens_do_not_cost_the_others_their_step():
    torch.manual_seed(0)
    x = torch.randn(400, 64)
    x[::100] *= 500
    ordinary = torch.arange(400) % 100 != 0
    errors = {}
    for name in ("peak", "exponent", "static"):
        quantizer = calibrated(site(8, token_steps=name), x)
        error = (quantizer(x) - x).square().sum(1) / x.square().sum(1)
        errors[name] = error[ordinary].mean().item()
        assert error.max() <= (1 if name == "static" else 1e-3)
    assert errors["peak"] < errors["exponent"] < 1e-3 < errors["static"]


def test_a_raised_token_is_the_unraised_one_times_a_power_of_two():
    torch.manual_seed(0)
    x = torch.randn(50, 64)
    for bits in (4, 8):
        for name in ("peak", "exponent"):
            quantizer = calibrated(site(bits, token_steps=name), x)
            assert torch.equal(quantizer(x * 2.0**20) * 2.0**-20, quantizer(x * 2.0**12) * 2.0**-12)


@pytest.mark.parametrize(
    ("name", "multipliers"),
    [
        ("peak", lambda x, step: peak_multiplier(x)),
        ("exponent", lambda x, step: power_of_two(token_exponent(x, step * 14))),
    ],
)
def test_the_gradient_to_the_base_step_is_that_of_the_tokens_times_what_they_multiply_it_by(
    name, multipliers
):
    torch.manual_seed(0)
    x = torch.randn(3, 64) * torch.tensor([[1.0], [64.0], [1024.0]])
    quantizer = calibrated(site(4, token_steps=name), torch.randn(50, 64)).train()
    step = quantizer.quantizer(4).step
    powers = multipliers(x, step)
    direction = torch.randn_like(x)
    (quantizer(x) * direction).sum().backward()
    scaled = x / (step * powers)
    inside = (scaled >= -8) & (scaled <= 7)
    per_step = scaled.round().clamp(-8, 7) - scaled * inside
    expected = (per_step * direction * powers).sum() * step / math.sqrt(x.numel() * 7)
    torch.testing.assert_close(
        quantizer.quantizer(4).log_step.grad, expected.reshape(1), rtol=1e-4, atol=1e-4
    )
