"""The Hadamard transform: its matrix, its inverse in the weight, and what it does to outliers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import TINY, some_ids, tiny_model
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import FLOAT, HADAMARD_SITES
from squat.quantization.hadamard import block_of, fold, hadamard, hadamard_product, scale_of

blocks = st.integers(0, 8).map(lambda k: 2**k)


@given(st.integers(1, 10_000))
def test_a_block_is_the_largest_power_of_two_that_divides(size):
    block = block_of(size)
    assert size % block == 0
    assert size // block % 2 == 1
    assert block.bit_count() == 1


@given(blocks)
def test_the_matrix_is_orthogonal_up_to_a_power_of_two(block):
    matrix = hadamard(torch.eye(block), block)
    scale = scale_of(block)
    assert 1 <= scale * block**0.5 < 2
    assert torch.equal(matrix.abs(), torch.full_like(matrix, scale))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(block) * block * scale**2)


@given(blocks, st.integers(1, 3), st.integers(0, 1000))
def test_folded_into_the_weight_it_changes_no_product(block, count, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 5, block * count), torch.randn(7, block * count)
    product = hadamard(x, block) @ fold(weight, block).T
    torch.testing.assert_close(product, x @ weight.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(hadamard_product(x, block), hadamard(x, block))


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
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)


def test_an_outlier_is_spread():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 40.0
    assert hadamard(x, 64).abs().max() < 10
