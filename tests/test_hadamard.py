"""The Hadamard transform: its matrix, its inverse in the weight, and what it does to outliers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import TINY, some_ids, tiny_model
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import FLOAT, HADAMARD_SITES
from squat.quantization.hadamard import (
    fold,
    hadamard,
    hadamard_product,
    inverse_factor,
    odd_factors,
    power_of_two_in,
    scale_of,
)

powers = st.integers(0, 8).map(lambda k: 2**k)
odds = st.sampled_from([1, 3, 5, 9, 15, 19])


@given(st.integers(1, 10_000))
def test_a_size_is_a_power_of_two_and_odd_primes(size):
    power = power_of_two_in(size)
    assert power.bit_count() == 1
    assert power * math.prod(odd_factors(size)) == size
    for factor in odd_factors(size):
        assert all(factor % smaller for smaller in range(2, factor))


@given(powers, st.integers(0, 8))
def test_a_hadamard_matrix_is_orthogonal_up_to_a_power_of_two(block, log_inner):
    inner = min(2**log_inner, block)
    matrix = hadamard(torch.eye(block), block, inner)
    scale, count = scale_of(block, inner), block // inner
    assert 1 <= scale * count**0.5 < 2
    assert torch.equal(matrix, matrix.T)
    assert set(matrix.abs().unique().tolist()) <= {0.0, scale}
    assert ((matrix != 0).sum(dim=0) == count).all()
    assert torch.equal(matrix @ matrix, torch.eye(block) * inverse_factor(block, inner))


@given(powers.filter(lambda power: power <= 64), odds)
def test_twice_is_once_and_back(power, odd):
    block = power * odd
    matrix = hadamard(torch.eye(block), block).double()
    expected = torch.eye(block, dtype=torch.float64) * inverse_factor(block)
    torch.testing.assert_close(matrix @ matrix, expected, atol=1e-5, rtol=0)


def test_blocks_are_mixed():
    """Of nine blocks none keeps more than a fifth of what it had."""
    energy = hadamard(torch.eye(9), 9).square()
    torch.testing.assert_close(energy.sum(dim=0), torch.ones(9))
    assert energy.max() < 0.2


@given(powers, odds, st.integers(0, 3), st.integers(1, 3), st.integers(0, 1000))
def test_folded_into_the_weight_it_changes_no_product(power, odd, log_inner, count, seed):
    torch.manual_seed(seed)
    block, inner = power * odd, min(2**log_inner, power)
    x, weight = torch.randn(2, 5, block * count), torch.randn(7, block * count)
    torch.testing.assert_close(hadamard_product(x, block, inner), hadamard(x, block, inner))
    x, weight = x.double(), weight.double()
    product = hadamard(x, block, inner) @ fold(weight, block, inner).T
    torch.testing.assert_close(product, x @ weight.T, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_without_bits_the_model_stays_what_it_was(name):
    free = SquatConfig(
        weight_bits=FLOAT,
        embedding_bits=FLOAT,
        activation_bits=FLOAT,
        site_bits=dict.fromkeys(("probs", "head_in"), FLOAT),
        hadamard=HADAMARD_SITES,
    )
    ids = some_ids()
    with torch.no_grad():
        expected = tiny_model(name)(ids).logits
        model = quantize(tiny_model(name), free, calibration=[ids]).eval()
        assert (model(ids).logits - expected).abs().max() < 1e-5 * expected.std()


def test_an_outlier_is_spread():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 40.0
    assert hadamard(x, 64).abs().max() < 10
