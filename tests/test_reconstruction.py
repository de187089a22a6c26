"""Layers trained by themselves: nearer to the float model's, resumable, the rest untouched."""

import pytest
import torch

from models import TINY, some_ids, tiny_model
from squat.quantization import SquatConfig, quantize
from squat.reconstruction import Reconstruction, reconstruct

SETTINGS = Reconstruction(epochs=8, batch_size=4, learning_rate=3e-4)


def quantized(name="llama", **config):
    return quantize(tiny_model(name), SquatConfig(**config), [some_ids(16, 32)])


@pytest.mark.parametrize("name", [*TINY, "lfm2"])
@pytest.mark.parametrize("bits", [8, "4:8"])
def test_every_layer_comes_nearer_to_the_original(name, bits):
    model = quantized(name, activation_bits=bits, hadamard=())
    windows, tests = some_ids(16, 32), some_ids(16, 32, seed=1)
    with torch.no_grad():
        expected = tiny_model(name)(tests).logits
        before = (model.eval()(tests).logits - expected).square().mean()
    errors = reconstruct(model, tiny_model(name), windows, SETTINGS)
    assert len(errors) == 3
    assert all(after < start for start, after in errors)
    if bits == 8:  # where tokens' widths do not move as well
        with torch.no_grad():
            assert (model.eval()(tests).logits - expected).square().mean() < before


def test_what_is_done_is_kept_and_taken_up(tmp_path):
    windows = some_ids(8, 32)
    whole = quantized()
    reconstruct(whole, tiny_model(), windows, SETTINGS, tmp_path / "whole")
    (tmp_path / "part").mkdir()
    for index in (0, 1):
        file = f"layer-{index}.safetensors"
        (tmp_path / "part" / file).write_bytes((tmp_path / "whole" / file).read_bytes())
    resumed, seen = quantized(), []
    errors = reconstruct(
        resumed, tiny_model(), windows, SETTINGS, tmp_path / "part", lambda *at: seen.append(at)
    )
    assert len(errors) == 1
    assert seen == [(1, 3), (2, 3), (3, 3)]
    theirs = whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.state_dict().items())


def test_embeddings_and_head_are_left_alone():
    model = quantized()
    before = {n: v.clone() for n, v in model.state_dict().items() if ".layers." not in n}
    reconstruct(model, tiny_model(), some_ids(8, 32), SETTINGS)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
