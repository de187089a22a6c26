"""Products of codes: the same numbers as products of what codes stand for, in training and in evaluation."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from transformers.pytorch_utils import Conv1D

from squat.exact import exact_product
from squat.hardware import is_faster
from squat.quantization import SquatConfig, products
from squat.quantization.frozen import freeze_codes
from squat.quantization.modules import QUANTIZED, QuantizedLinear, SiteQuantizer
from squat.quantization.products import code_product, steps_of
from squat.quantization.quantizers import LearnedStepQuantizer


@pytest.fixture(params=["int8", "float32"], autouse=True)
def kind_of_product(request, monkeypatch):
    """Both, whichever pays on this CPU."""
    int8 = request.param == "int8"
    if int8 and not products._int8_product_is_exact():
        pytest.skip("PyTorch's int8 product is not exact on this CPU")
    monkeypatch.setattr(products, "_int8_product_pays", lambda: int8)


def on_lattice(rows: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor [rows, n] of all int8 codes, with a step a row that fp16 represents."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, n), generator=generator)
    step = (torch.rand(rows, 1, generator=generator) + 0.01).half().float()
    return codes * step, step


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40),
    st.integers(2, 200) | st.integers(1020, 2100),
    st.integers(1, 70),
    st.integers(0, 1000),
    st.booleans(),
)
def test_a_product_of_codes_is_that_of_the_tensors(tokens, inputs, outputs, seed, one_step):
    """Rounded once it is the exact product; otherwise it is as near as float32 allows."""
    x, step = on_lattice(tokens, inputs, seed)
    weight, weight_step = on_lattice(outputs, inputs, seed + 1)
    if one_step:
        weight, weight_step = weight / weight_step * 0.25, torch.tensor([0.25])
    expected = exact_product(x, weight.T)
    exact = code_product(x, step, weight, weight_step.view(-1), exact=True)
    assert torch.equal(exact, expected)
    near = code_product(x[None], step[None], weight, weight_step.view(-1), exact=False)
    torch.testing.assert_close(near, expected[None], rtol=1e-6, atol=0)


def test_the_largest_codes_of_many_inputs_are_summed_exactly():
    x = torch.full((3, 4000), -128.0)
    x[1:] = 127.0
    weight = x[:2].clone()
    product = code_product(x, torch.ones(1), weight, torch.ones(1), exact=True)
    assert torch.equal(product, (x.double() @ weight.double().T).float())


def linear(block=1, **options) -> tuple[SiteQuantizer, QuantizedLinear]:
    """A site, whose blocks are transformed, and a layer that reads it."""
    torch.manual_seed(0)
    site = SiteQuantizer("mlp_in", 0, SquatConfig(**options), block)
    layer = QuantizedLinear.wrap(nn.Linear(48, 24), LearnedStepQuantizer(4, shape=(24, 1)))
    layer.weight_quantizer.initialize(layer.weight, "mse")
    for quantizer in site.by_width.values():
        quantizer.start_at(torch.tensor([0.02]))
    return site, layer


def test_gradients_are_those_of_float_products():
    """Of the input, the weight, the bias and every step."""
    site, layer = linear(activation_bits=8, activation_levels="uniform")
    x = torch.randn(2, 5, 48) * torch.tensor([1.0, 10, 0.1, 3, 1])[:, None]
    gradients = []
    for remembered in (True, False):
        given = x.clone().requires_grad_()
        quantized = site(given)
        assert steps_of(quantized) is not None
        out = layer(quantized if remembered else quantized.view_as(quantized))
        out.square().sum().backward()
        parameters = [*site.parameters(), *layer.parameters()]
        gradients.append([given.grad, *(p.grad.clone() for p in parameters)])
        site.zero_grad()
        layer.zero_grad()
    for ours, floats in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, floats, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("rows", [True, False])
def test_steps_of_frozen_codes_have_the_gradient_of_codes_times_steps(kind, rows):
    """By products of codes as by those of floats; the weight has none."""
    site, _ = linear(activation_bits=8, activation_levels="uniform")
    torch.manual_seed(1)
    shape = ((24, 1) if kind is nn.Linear else (1, 24)) if rows else (1,)
    of = kind(48, 24) if kind is nn.Linear else kind(24, 48)
    layer = QUANTIZED[kind].wrap(of, LearnedStepQuantizer(4, shape=shape))
    layer.weight_quantizer.initialize(layer.weight, "mse")
    freeze_codes(layer)
    x, gradients = torch.randn(2, 5, 48), []
    for remembered in (True, False):
        quantized = site(x)
        layer(quantized if remembered else quantized.clone()).square().sum().backward()
        gradients.append(layer.weight_quantizer.log_step.grad.clone())
        layer.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("block", [1, 16, 48])
def test_training_in_bfloat16_sees_the_exact_numbers(block):
    """Autocast changes the dtype of gradients, not one number of the forward pass."""
    site, layer = linear(block, activation_bits=8, activation_levels="uniform")
    x = torch.randn(3, 48)
    expected = layer(site(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(site(x))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("block", [1, 16])
def test_a_site_gives_what_it_gets(block):
    """Whatever it computes in."""
    site, _ = linear(block, activation_bits=8)
    x = torch.randn(3, 48)
    for dtype in (torch.float32, torch.bfloat16):
        assert site(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("where", ["weight", "input"])
def test_what_is_no_number_comes_through(where):
    """A code cannot say NaN."""
    site, layer = linear(activation_bits=8, activation_levels="uniform")
    x = torch.randn(3, 48)
    (layer.weight.data if where == "weight" else x)[1, 7] = torch.nan
    out = layer(site(x))
    assert (out[:, 1] if where == "weight" else out[1]).isnan().all()
    assert out.isfinite().any()


def test_only_what_was_quantized_is_taken_for_it():
    """Another tensor of the same values has no codes, nor has noise."""
    site, _ = linear(activation_bits=8, activation_levels="uniform")
    quantized = site(torch.randn(3, 48))
    assert steps_of(quantized) is not None
    assert steps_of(quantized.clone()) is None
    noisy = SiteQuantizer("mlp_in", 0, SquatConfig(method="nipq", activation_bits=8))
    for quantizer in noisy.by_width.values():
        quantizer.start_at(torch.tensor([0.02]))
    assert steps_of(noisy(torch.randn(3, 48))) is None
    assert steps_of(noisy.eval()(torch.randn(3, 48))) is not None


def test_asking_what_is_fast_leaves_the_threads_as_they_are():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        is_faster(torch.matmul, lambda a, b: (a.float() @ b.float()) * 2, torch.bfloat16)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
