"""Calibration layer by layer, and weights that are rounded as a whole."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import TINY, some_ids, tiny_model
from squat.errors import ConfigError
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import FLOAT
from squat.quantization.descent import DAMPINGS, Evidence, Moments, best_damping, descend
from squat.quantization.levels import WEIGHT_LEVELS, snap_to
from squat.quantization.modules import QuantizedWeight
from squat.quantization.numerics import mse_step, quantize_codes, representable_step


def correlated(tokens, inputs, seed):
    torch.manual_seed(seed)
    return torch.randn(tokens, inputs) @ (
        torch.randn(inputs, inputs) / inputs**0.5 + torch.eye(inputs)
    )


def nearest(rounding, quotients):
    return quantize_codes(quotients, torch.ones(1), *rounding)


def moments_of(quantized, original):
    moments = Moments.zeros(quantized.shape[1])
    moments.add(quantized, original)
    return moments


ROUNDINGS = {
    "4 bits": (-8, 7, None),
    "8 bits": (-128, 127, None),
    "levels": (-127, 113, snap_to(torch.tensor(WEIGHT_LEVELS["iq4_nl"]))),
}


@given(st.integers(0, 1000), st.sampled_from(sorted(ROUNDINGS)), st.integers(1, 3))
def test_rounding_as_a_whole_is_no_worse_for_the_product(seed, name, sweeps):
    rounding = ROUNDINGS[name]
    original = correlated(200, 24, seed)
    quantized = original + 0.05 * torch.randn_like(original)
    weight = torch.randn(10, 24)
    steps = mse_step(weight, *rounding)[:, None]
    moments = moments_of(quantized, original)
    free, found = descend(weight, steps, partial(nearest, rounding), moments, sweeps, 1e-4)
    codes = quantize_codes(free, found, *rounding)
    assert torch.equal(free, codes * found)
    assert torch.equal(found, representable_step(found))

    def error(codes, steps):
        return (quantized @ (codes * steps).T - original @ weight.T).square().sum().item()

    by_itself = error(quantize_codes(weight, steps, *rounding), steps)
    assert error(codes, found) <= by_itself * 1.001 + 1e-6


def test_a_weight_that_lies_on_the_lattice_stays():
    x = correlated(200, 24, 0)
    codes = torch.randint(-8, 8, (10, 24)).float()
    steps = representable_step(torch.rand(10, 1) + 0.1)
    rounded = partial(nearest, ROUNDINGS["4 bits"])
    found, kept = descend(codes * steps, steps, rounded, moments_of(x, x), 2, 1e-3)
    assert torch.equal(quantize_codes(found, kept, -8, 7), codes)
    assert torch.equal(kept, steps)


def test_how_hard_a_weight_is_held_is_tried_out_on_text_that_it_has_not_seen():
    rounded = partial(nearest, ROUNDINGS["4 bits"])
    torch.manual_seed(0)
    mixing = torch.randn(48, 48) / 48**0.5
    weight = torch.randn(64, 48)
    steps = mse_step(weight, *ROUNDINGS["4 bits"])[:, None]
    unseen = torch.randn(4096, 48) @ mixing

    def found_with(sequences):
        evidence = Evidence(48)
        for part in (torch.randn(sequences, 8, 48) @ mixing).split(3):
            evidence.add(part, part)
        chosen = best_damping(weight, steps, rounded, evidence)
        errors = {}
        for damping in DAMPINGS:
            free, _ = descend(weight, steps, rounded, evidence.all, 4, damping)
            errors[damping] = float((unseen @ (free - weight).T).square().sum())
        return chosen, errors

    few, errors = found_with(8)
    assert few > DAMPINGS[0]
    assert errors[few] < errors[DAMPINGS[0]]
    many, errors = found_with(512)
    assert many < few
    assert errors[many] < 1.02 * min(errors.values())
    assert found_with(3)[0] == 0.1  # none can be held back


def weights_only(**settings):
    free = dict.fromkeys(("probs", "head_in"), FLOAT)
    return SquatConfig(embedding_bits=FLOAT, activation_bits=FLOAT, site_bits=free, **settings)


@pytest.mark.parametrize("name", [*TINY, "lfm2"])
@pytest.mark.parametrize("weight_steps", ["row", "tensor"])
def test_descent_keeps_more_of_a_model_than_rounding_to_nearest(name, weight_steps):
    # The text that the model writes itself; random tokens have no structure that weights could use.
    ids = some_ids(16, 48)
    torch.manual_seed(0)
    tests = some_ids(8, 48, seed=1)
    with torch.no_grad():
        expected = tiny_model(name)(tests).logits
    errors = {}
    for weights in ("nearest", "descent"):
        config = weights_only(weight_bits=4, weight_steps=weight_steps)
        model = quantize(tiny_model(name), config, [ids[:8], ids[8:]], weights).eval()
        with torch.no_grad():
            errors[weights] = (model(tests).logits - expected).square().mean().item()
        for module in model.modules():
            if isinstance(module, QuantizedWeight) and hasattr(module, "weight_quantizer"):
                steps = module.weight_quantizer.step
                assert torch.equal(steps, representable_step(steps))
    assert errors["descent"] < errors["nearest"]


@pytest.mark.parametrize("config", [SquatConfig(), SquatConfig(activation_bits=4)])
def test_what_descent_found_is_what_the_model_computes_with(config):
    model = quantize(tiny_model(), config, [some_ids(8, 48)] * 2, "descent").eval()
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            values = module.codes() * module.weight_quantizer.step
            assert torch.equal(values, module.weight_quantizer(module.weight))


def test_progress_is_told_layer_by_layer():
    seen = []
    quantize(
        tiny_model(), None, [some_ids()], progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (None, "closest", "weights: 'closest' does not exist"),
        (SquatConfig(method="pact"), "descent", "method 'pact'"),
        (None, "descent", "calibration: 30 tokens are too few"),
    ],
)
def test_what_does_not_go_together_is_refused(config, weights, message):
    with pytest.raises(ConfigError, match=message):
        quantize(tiny_model(), config, [some_ids(1, 30)], weights)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_4_bits_is_rounded_for_its_inputs(name, tied):
    ids, tests = some_ids(32, 48), some_ids(8, 48, seed=1)
    with torch.no_grad():
        expected = tiny_model(name, tie_word_embeddings=tied)(tests).logits
    errors = {}
    for weights in ("nearest", "descent"):
        config = SquatConfig(weight_bits=8, activation_bits=8, embedding_bits=4)
        model = tiny_model(name, tie_word_embeddings=tied)
        quantize(model, config, ids.split(8), weights).eval()
        with torch.no_grad():
            errors[weights] = (model(tests).logits - expected).square().mean().item()
    assert errors["descent"] < 0.95 * errors["nearest"]
