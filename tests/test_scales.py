"""Channel scales: the model computes what it did, and rounding does less harm."""

import pytest
import torch

from models import ARCHITECTURES, some_ids, tiny_model
from squat import SquatConfig
from squat.architectures import architecture_of
from squat.quantization import quantize
from squat.quantization.scales import balance_channels


def uneven_model(name):
    """A random model whose norms, biases and columns are of many sizes."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            factors = torch.randn(parameter.shape[-1], generator=generator).exp()
            parameter.mul_(factors).add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_computes_what_it_did(name):
    model, ids = uneven_model(name).double(), some_ids()
    expected = logits_of(model, ids)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    balance_channels(model, SquatConfig(activation_bits=4), [ids])
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    row = architecture_of(model.config.model_type)
    for index, layer in enumerate(model.get_submodule(row.layers).children()):
        for path in row.of(layer).makers.values():
            assert f"{row.layers}.{index}.{path}.weight" in changed
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=1e-5)


def unbalance(model, ids):
    """How far the sizes of channels and of columns are apart at a layer's down projection."""
    inputs = []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, -2))
    )
    logits_of(model, ids)
    hook.remove()
    energy = torch.nn.functional.normalize(inputs[0]).square().sum(dim=0)
    return float((energy / layer.weight.detach().square().sum(dim=0)).log().std())


def test_channels_and_columns_are_in_balance_afterwards():
    model, ids = uneven_model("llama"), some_ids()
    before = unbalance(model, ids)
    balance_channels(model, SquatConfig(activation_bits=4), [ids])
    assert unbalance(model, ids) < 0.2 * before


def test_sites_where_rounding_does_no_harm_stay_as_they_are():
    model, ids = uneven_model("llama"), some_ids()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    balance_channels(model, SquatConfig(activation_bits=8), [ids], "descent")
    balance_channels(model, SquatConfig(activation_bits=8, weight_bits=8), [ids])
    balance_channels(model, SquatConfig(activation_bits=4), [])
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [4, "4:8", 8])
def test_rounding_does_less_harm(bits):
    ids = some_ids()
    errors = []
    for scales in (False, True):
        model = tiny_model()
        with torch.no_grad():  # some channels of the norms are loud, and hardly listened to
            for layer in model.model.layers:
                for norm, readers in (
                    (layer.input_layernorm, layer.self_attn),
                    (layer.post_attention_layernorm, layer.mlp),
                ):
                    norm.weight[:4] *= 20
                    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                        if hasattr(readers, name):
                            getattr(readers, name).weight[:, :4] /= 20
        expected = logits_of(model, ids)
        config = SquatConfig(activation_bits=bits, channel_scales=scales)
        quantize(model, config, calibration=[ids])
        errors.append(float((logits_of(model, ids) - expected).square().mean()))
    assert errors[1] < 0.5 * errors[0]
