"""Centers of keys: no attention notices them, and the keys' codes have less to say."""

import pytest
import torch

from models import ARCHITECTURES, PUBLISHED, some_ids, tiny_model
from squat import SquatConfig
from squat.quantization import quantize
from squat.quantization.modules import SiteQuantizer

SETTINGS = {**PUBLISHED, "activation_bits": 4, "key_centers": True, "hadamard": ("k",)}


def keys_of(model):
    return [m for m in model.modules() if isinstance(m, SiteQuantizer) and m.site == "k"]


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_attention_notices_them(name):
    ids = some_ids()
    model = quantize(tiny_model(name), SquatConfig(**SETTINGS), [ids])
    for site in keys_of(model):
        site.start_collecting(keep=False)  # centered, not quantized
    expected = logits_of(model, ids)
    for site in keys_of(model):
        site.center.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)


def biased_model():
    """Keys whose heads have a large mean, each another one."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for layer in model.transformer.h:
            hidden = layer.attn.c_attn.bias.shape[0] // 3
            layer.attn.c_attn.bias[hidden : 2 * hidden].normal_(0, 3)
    return model


def test_they_are_the_mean_and_errors_are_smaller():
    ids = some_ids(4, 48)
    expected, found = logits_of(biased_model(), ids), {}
    for centers in (False, True):
        config = SquatConfig(**{**SETTINGS, "key_centers": centers})
        model = quantize(biased_model(), config, [ids])
        found[centers] = float((logits_of(model, ids) - expected).square().mean())
    assert all(float(site.center.square().mean()) > 1 for site in keys_of(model))
    assert found[True] < found[False]


@pytest.mark.parametrize("bits", [4, 8, "4:8"])
def test_keys_of_8_bits_have_none(bits):
    model = quantize(tiny_model("llama"), SquatConfig(activation_bits=bits), [some_ids()])
    # Before the first attention every token of a 4:8 model has 8 bits.
    assert [site.center is not None for site in keys_of(model)] == {
        4: [True, True, True],
        8: [False, False, False],
        "4:8": [False, True, True],
    }[bits]
