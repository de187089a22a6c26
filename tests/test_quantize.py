"""Quantizing a model: all sites, causality, token widths through the cache, saving, bad input."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import (
    PUBLISHED,
    TINY,
    quantized_model,
    real_data,
    real_model,
    some_ids,
    tiny_model,
)
from squat.errors import ConfigError
from squat.quantization import SquatConfig, quantize
from squat.quantization.attention import AttentionSites
from squat.quantization.config import SITES
from squat.quantization.modules import QuantizedLinear, QuantizedWeight, SiteQuantizer
from squat.quantization.quantizers import QUANTIZERS
from squat.quantization.tokens import IMPORTANCE, Arrival

CONFIGS = {
    "w8a8": SquatConfig(weight_bits=8, activation_bits=8),
    "w4a8": SquatConfig(activation_bits=8),
    "w4a4": SquatConfig(activation_bits=4),
    "4:8": SquatConfig(),
    "4:8 topk": SquatConfig(policy="topk"),
    "4:8 but mlp_mid 8": SquatConfig(site_bits={"mlp_mid": 8}),
    "4:8 uniform": SquatConfig(activation_levels="uniform"),
    "the paper's": SquatConfig(**PUBLISHED),
    **{name: SquatConfig(method=name) for name in QUANTIZERS if name != "lsq"},
}


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_matrix_product_has_quantized_operands(name, config):
    model = quantized_model(name, config)
    layers = model.config.num_hidden_layers
    sites = [m for m in model.modules() if isinstance(m, SiteQuantizer)]
    found = {(s.site, s.layer) for s in sites}
    expected = {(site, layer) for site in SITES if site != "head_in" for layer in range(layers)}
    assert found == expected | {("head_in", layers)}
    matrices = [m for m in model.modules() if getattr(m, "weight", torch.empty(0)).dim() == 2]
    assert all(isinstance(m, QuantizedWeight) for m in matrices)
    assert len(matrices) >= 4 * layers + 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_reaches_every_matrix_lies_on_its_lattice():
    """Observed through hooks of the test's own: operands are integers times the step."""
    config = SquatConfig(activation_bits=4, token_steps="static", wide_first_token=False)
    model, seen = quantized_model(config=config), []

    def check(module, args):
        parents = {
            f"{k}.{leaf}": v.input_quantizer
            for k, v in model.named_modules()
            if hasattr(v, "input_quantizer")
            for leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "")
        }
        name = next(n for n, m in model.named_modules() if m is module)
        site = parents.get(name) or parents[f"{name}."]
        (quantizer,) = site.by_width.values()
        codes = args[0] / quantizer.step
        assert (codes - codes.round()).abs().max() < 1e-3
        assert codes.round().unique().numel() > 4
        seen.append(name)

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(check)
    logits(model, some_ids())
    assert len(seen) == 7 * 3 + 1


def test_float_bits_leave_the_model_as_it_was():
    config = SquatConfig(
        weight_bits=32,
        embedding_bits=32,
        activation_bits=32,
        site_bits={"probs": 32, "head_in": 32},
    )
    ids = some_ids()
    torch.testing.assert_close(
        logits(quantized_model(config=config), ids), logits(tiny_model(), ids), atol=1e-5, rtol=1e-5
    )


def test_more_bits_are_closer_to_full_precision():
    ids, reference = some_ids(), logits(tiny_model(), some_ids())
    errors = [
        (logits(quantized_model(config=CONFIGS[name]), ids) - reference).square().mean().item()
        for name in ("w8a8", "w4a8", "w4a4")
    ]
    assert errors == sorted(errors)


def test_a_tied_head_shares_tensor_and_step():
    model = quantized_model("llama")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.weight_quantizer.log_step is embedding.weight_quantizer.log_step
    untied = quantized_model("llama-untied")
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize(
    "config",
    [*(SquatConfig(importance=name) for name in IMPORTANCE), SquatConfig(activation_bits=4)],
)
def test_a_later_token_never_changes_an_earlier_logit(config):
    model, ids = quantized_model(config=config), some_ids()
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 11) % 90 + 3
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("chunks", [[1] * 24, [7, 7, 7, 3], [23, 1]])
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("name", TINY)
def test_with_a_cache_tokens_get_the_widths_that_they_get_in_one_piece(name, importance, chunks):
    model, ids = quantized_model(name, SquatConfig(importance=importance)), some_ids()
    whole = logits(model, ids)
    wide = {layer: w.clone() for layer, w in model.token_state.wide.items()}
    assert 0.2 < torch.cat(list(wide.values())).float().mean() < 0.8
    cache, pieces, widths, start = None, [], [], 0
    for size in chunks:
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True
            )
        cache, start = out.past_key_values, start + size
        pieces.append(out.logits)
        widths.append(dict(model.token_state.wide))
    for layer in wide:
        assert torch.equal(torch.cat([w[layer] for w in widths], dim=1), wide[layer])
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_beam_search_keeps_widths_with_their_beams():
    model, ids = quantized_model(), some_ids(1, 8)
    found = model.generate(
        ids,
        num_beams=4,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
    )
    sequence = found.sequences[:, :-1]
    score = logits(model, sequence)[0, 7:].log_softmax(-1)
    total = score.gather(1, found.sequences[0, 8:, None]).sum() / 8
    torch.testing.assert_close(found.sequences_scores[0], total, atol=1e-4, rtol=1e-4)


def test_a_cache_that_does_not_know_the_widths_is_refused():
    model, ids = quantized_model(), some_ids()
    with torch.no_grad():
        cache = tiny_model()(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="DynamicCache"):
        logits(model, ids[:, 10:], past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "config",
    [*(SquatConfig(importance=name) for name in IMPORTANCE), SquatConfig(policy="topk")],
)
def test_padding_changes_nothing(side, config):
    model, ids = quantized_model(config=config), some_ids(1, 12)
    pad = torch.zeros(1, 5, dtype=torch.long)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pad)
    if side == "left":
        padded, mask, real = torch.cat([pad, ids], 1), torch.cat([zeros, ones], 1), slice(5, None)
        positions = torch.cat([zeros, torch.arange(12)[None]], 1)
    else:
        padded, mask, real = torch.cat([ids, pad], 1), torch.cat([ones, zeros], 1), slice(0, 12)
        positions = torch.arange(17)[None]
    got = logits(model, padded, attention_mask=mask, position_ids=positions)[:, real]
    assert model.token_state.real is None or model.token_state.real.sum() == 12
    torch.testing.assert_close(got, logits(model, ids), atol=1e-4, rtol=1e-4)


def test_recent_keys_are_seen_in_8_bits():
    """As long as all keys are recent, it is as if keys had 8 bits."""
    recent = 16
    settings = {"activation_bits": 8, "key_centers": False, "wide_first_token": False}
    narrow = SquatConfig(**settings, site_bits={"k": 4}, recent_keys=recent)
    calibration = [some_ids(4, recent)]
    wide = quantize(tiny_model("llama"), SquatConfig(**settings), calibration).eval()
    model = quantize(tiny_model("llama"), narrow, calibration).eval()
    ids = some_ids(2, 3 * recent)
    with torch.no_grad():
        expected, got = wide(ids).logits, model(ids).logits
    assert torch.equal(got[:, :recent], expected[:, :recent])
    assert not torch.equal(got[:, recent:], expected[:, recent:])


def test_importance_is_what_its_name_says():
    """One sequence of three tokens, two heads; the first token is behind one of padding."""
    scores = torch.randn(1, 2, 3, 4)
    value = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [1.0, -1.0]]])[:, None]
    arrival = Arrival(
        scores.softmax(-1),
        scores,
        value,
        torch.tensor([[1, 1, 1]]),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[7, 0, 2]], dtype=torch.int32),
    )
    expected = {
        "first_token": scores.softmax(-1)[..., 1].mean(1),
        "relative_first_token": scores.softmax(-1)[..., 1].mean(1) * torch.tensor([1, 2, 3]),
        "first_token_score": scores[..., 1].mean(1),
        "value_peak": torch.tensor([[16 / 12.5, 2.0, 1.0]]),
        "rarity": torch.tensor([[7.0, 0.0, 2.0]]),
        "scattered": torch.tensor([[0.0, 0.618034, 0.236068]]),
        "earliest": torch.tensor([[-1.0, -2.0, -3.0]]),
    }
    assert expected.keys() == IMPORTANCE.keys()
    for name, importance in IMPORTANCE.items():
        torch.testing.assert_close(importance(arrival), expected[name])


def test_by_rarity_the_most_frequent_tokens_of_the_text_are_narrow_in_every_layer():
    text = some_ids(8, 32)  # what the model was calibrated on
    model = quantized_model(config=SquatConfig(importance="rarity", wide_first_token=False))
    logits(model, text)
    wide, *others = model.token_state.wide.values()
    assert others
    assert all(torch.equal(wide, other) for other in others)
    assert abs(wide.float().mean().item() - 0.5) < 0.05
    counts = text.flatten().bincount()
    assert counts[text[wide]].max() <= counts[text[~wide]].min()


def test_rarity_needs_the_tokens():
    model = quantized_model(config=SquatConfig(importance="rarity"))
    with pytest.raises(ConfigError, match="pass input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(some_ids()))


@given(st.integers(1, 500), st.floats(0, 1))
def test_scattered_tokens_make_any_share_of_a_text(tokens, share):
    visible = torch.arange(1, tokens + 1)[None]
    nothing = torch.zeros(0)
    chosen = IMPORTANCE["scattered"](Arrival(nothing, nothing, nothing, nothing, visible)) >= share
    assert abs(chosen.sum().item() - (1 - share) * tokens) < 5


def test_top_k_gives_each_sequence_its_own_share():
    config = SquatConfig(policy="topk", ratio=0.25, wide_first_token=False)
    model = quantized_model(config=config)
    logits(model, some_ids(5, 24))
    for wide in model.token_state.wide.values():
        assert wide.sum(dim=1).tolist() == [6] * 5


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_threshold_realises_the_requested_share_on_its_text(ratio):
    model = quantize(tiny_model(), SquatConfig(ratio=ratio), calibration=[some_ids(16, 32)]).eval()
    logits(model, some_ids(16, 32))
    assert model.token_state.realised_share().tolist() == pytest.approx([ratio] * 3, abs=0.1)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_checkpoint_reads_back_bit_for_bit(name, config, tmp_path):
    model, ids = quantized_model(name, config), some_ids()
    with torch.no_grad():  # what training does: move everything off its initial value
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.to_dict() == config.to_dict()
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_in_a_checkpoint_from_before_weights_had_levels_they_have_none(tmp_path):
    model = quantized_model("llama", SquatConfig(weight_levels="uniform"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["weight_levels"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))


def test_a_float_checkpoint_can_be_quantized_while_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SquatConfig())
    direct = quantize(tiny_model()).eval()
    assert torch.equal(logits(loaded, some_ids()), logits(direct, some_ids()))


def test_importing_squat_is_light_and_its_names_register_the_format(tmp_path):
    quantized_model().save_pretrained(tmp_path)
    program = f"""
import sys, squat
assert not {{"torch", "transformers"}} & set(sys.modules), "import squat is not light"
squat.SquatConfig
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).hf_quantizer).__name__)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "SquatHfQuantizer" in out.stdout


def test_a_deep_copy_has_quantizers_of_its_own():
    model, ids = quantized_model(), some_ids()
    before = logits(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, (SiteQuantizer, AttentionSites)):
                for parameter in module.parameters():
                    parameter.add_(1.0)
    assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(twin, ids), before)
    assert twin.token_state is not model.token_state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight_bits": 9}, "weight_bits: 9 bits"),
        ({"weight_bits": "4:8"}, "weight_bits"),
        ({"activation_bits": 1}, "activation_bits: 1 bits"),
        ({"activation_bits": True}, "activation_bits: True"),
        ({"ratio": 1.5}, "ratio: 1.5"),
        ({"recent_keys": 65}, "recent_keys: 65 .* 0 to 64"),
        ({"recent_keys": True}, "recent_keys: True"),
        ({"ratio": "half"}, "ratio: 'half'"),
        ({"site_bits": {"mlp_middle": 8}}, "mlp_middle.*attn_in"),
        ({"site_bits": {"probs": "4:8"}}, "site_bits.probs"),
        ({"hadamard": "yes"}, "hadamard: 'yes'"),
        ({"hadamard": ["v"]}, "hadamard: 'v' does not exist"),
        ({"weight_steps": "column"}, "weight_steps: 'column' does not exist"),
        ({"token_steps": "dynamic"}, "token_steps: 'dynamic' does not exist"),
        ({"softmax": "base10"}, "softmax: 'base10' does not exist; choose one of base2, natural"),
        ({"weight_levels": "iq3"}, "weight_levels: 'iq3' does not exist; choose .*iq4_nl"),
        ({"activation_levels": 16}, "activation_levels: 16 does not exist"),
        ({"method": "gptq"}, "method: 'gptq'.*lsq"),
        ({"policy": "random"}, "policy: 'random'.*topk, threshold"),
        ({"importance": "loudness"}, "importance: 'loudness'"),
        ({"init": "zero"}, "init: 'zero'"),
    ],
)
def test_a_config_that_is_not_possible_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SquatConfig(**wrong)


def test_an_architecture_without_a_row_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=9, hidden_size=8, n_head=2, n_layer=1)
    )
    with pytest.raises(ConfigError, match="bloom"):
        quantize(model)


def test_without_calibration_steps_are_left_to_a_checkpoint():
    model = quantize(tiny_model(), calibration=[])
    steps = [p for name, p in model.named_parameters() if name.endswith("log_step")]
    assert len(steps) > 50
    assert all(step.isnan().all() for step in steps)
    model.load_state_dict(quantized_model().state_dict())
    assert torch.equal(logits(model.eval(), some_ids()), logits(quantized_model(), some_ids()))


def test_quantizing_twice_is_refused():
    with pytest.raises(ConfigError, match="already"):
        quantize(quantized_model())


@pytest.mark.slow
def test_on_a_real_model_and_text_8_bits_cost_nearly_nothing():
    text = (real_data() / "babylm/dev/simple_wiki.dev").read_text()[:20_000]
    name = real_model("babylm-6m")
    ids = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")["input_ids"]
    ids = ids[:, : 8 * 128].view(8, 128)
    losses = {}
    for label, config in {"float": None, **CONFIGS}.items():
        model = AutoModelForCausalLM.from_pretrained(name)
        if config is not None:
            quantize(model, config, calibration=[ids])
        with torch.no_grad():
            losses[label] = model.eval()(ids, labels=ids).loss.item()
    assert losses["w8a8"] - losses["float"] < 0.02
    assert losses["w4a8"] - losses["float"] < 0.15
    assert losses["w4a8"] < losses["4:8"] < losses["w4a4"] < losses["float"] + 0.8
