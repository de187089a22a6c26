"""Joint 4: the float steps are PyTorch's to a last bit, and the engine's logits are the same bits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from models import ARCHITECTURES, PUBLISHED, TINY, real_data, real_model, some_ids, tiny_model
from squat.data import train_tokenizer
from squat.deploy.export import describe, export
from squat.deploy.parity import compare
from squat.engine import Engine
from squat.errors import CheckpointError, EngineError
from squat.exact import (
    exponential,
    gelu,
    gelu_tanh,
    inverse_root,
    layer_norm,
    powers_of_two,
    rms_norm,
    silu,
    softmax,
)
from squat.quantization import SquatConfig, quantize
from squat.quantization.config import HADAMARD_SITES


@given(st.lists(st.floats(-64, 64, width=32), min_size=1, max_size=50))
def test_exponential_is_exact_to_a_last_bit(values):
    x = torch.tensor(values)
    expected = x.double().exp()
    assert ((exponential(x).double() - expected).abs() <= 1e-7 * expected).all()


def test_the_exact_functions_are_pytorchs_to_rounding():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 300) * 5, torch.randn(300)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))
    torch.testing.assert_close(silu(x), F.silu(x))
    torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    torch.testing.assert_close(gelu(x), F.gelu(x))
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (300,), weight, 1e-5))
    bias = torch.randn(300)
    expected = F.layer_norm(x, (300,), weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), expected)


def test_roots_and_quotients_are_correctly_rounded():
    """As IEEE 754 and every CPU's instructions have them; the float32 root of PyTorch is not."""
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 0.01
    expected = np.float32(1) / np.sqrt(x.numpy())
    assert np.array_equal(inverse_root(x).numpy(), expected)
    assert np.array_equal((x / x.flip(0)).numpy(), x.numpy() / x.numpy()[::-1])
    assert np.array_equal(x.reciprocal().numpy(), np.float32(1) / x.numpy())


def test_a_masked_key_gets_no_probability():
    scores = torch.tensor([[1.0, torch.finfo(torch.float32).min, 2.0]])
    assert softmax(scores)[0, 1] < 1e-27


def test_powers_of_two_are_a_softmax_not_yet_divided():
    scores = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 4
    terms, total = powers_of_two(scores * 1.44269504)
    torch.testing.assert_close(terms / total, scores.softmax(-1), rtol=3e-4, atol=1e-6)
    assert torch.equal(terms.amax(-1), torch.ones(50))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(powers_of_two(scores[:, order] * 1.44269504)[1], total)


def test_a_masked_key_is_no_power_of_two():
    scores = torch.tensor([[1.0, torch.finfo(torch.float32).min, -61.5, -61.0, 2.0]])
    terms, total = powers_of_two(scores)
    assert (terms == 0).tolist() == [[False, True, False, False, False]]
    assert torch.equal(total, powers_of_two(scores[:, [0, 2, 3, 4]])[1])
    assert powers_of_two(torch.tensor([[2.0, -62.0]]))[0][0, 1] == 0


def test_results_do_not_depend_on_the_batch():
    model = quantize(tiny_model(), calibration=[some_ids(8, 32)]).eval()
    ids = some_ids(16, 24)
    with torch.no_grad():
        together = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    assert torch.equal(together, alone)


CONFIGS = {
    "4:8": SquatConfig(),
    "4:8 published importance": SquatConfig(importance="first_token", ratio=0.25),
    "4:8 by the value": SquatConfig(importance="value_peak"),
    "w4a4": SquatConfig(activation_bits=4),
    "w4a8": SquatConfig(activation_bits=8, embedding_bits=4),
    "w8a8": SquatConfig(weight_bits=8, activation_bits=8),
    "mlp_mid at 8": SquatConfig(site_bits={"mlp_mid": 8, "k": 4}),
    "w4a4 uniform": SquatConfig(activation_bits=4, activation_levels="uniform"),
    "w4a4 8-bit weights": SquatConfig(activation_bits=4, weight_bits=8, embedding_bits=4),
    "the paper's": SquatConfig(**PUBLISHED),
    "steps by row": SquatConfig(**{**PUBLISHED, "weight_steps": "row"}),
    "softmax of powers of two": SquatConfig(**{**PUBLISHED, "softmax": "base2"}),
    "natural softmax": SquatConfig(softmax="natural"),
    "peaks": SquatConfig(**{**PUBLISHED, "token_steps": "peak"}),
    "token exponents": SquatConfig(**{**PUBLISHED, "token_steps": "exponent"}),
    "levels": SquatConfig(**{**PUBLISHED, "activation_levels": "table"}),
    "levels of weights": SquatConfig(**{**PUBLISHED, "weight_levels": "iq4_nl"}),
    "uniform weights": SquatConfig(weight_levels="uniform"),
    **{
        f"hadamard at {site}": SquatConfig(**{**PUBLISHED, "hadamard": (site,)})
        for site in HADAMARD_SITES
    },
    **{
        f"reflections at {site}": SquatConfig(
            **{**PUBLISHED, "hadamard": (site,), "reflections": True}
        )
        for site in HADAMARD_SITES
    },
    "centers of keys": SquatConfig(**{**PUBLISHED, "hadamard": ("k",), "key_centers": True}),
    "wide first token": SquatConfig(**{**PUBLISHED, "wide_first_token": True}),
    "wide first token, w4a4": SquatConfig(
        **{**PUBLISHED, "activation_bits": 4, "wide_first_token": True}
    ),
    "no wide first token": SquatConfig(wide_first_token=False),
    "no recent keys": SquatConfig(activation_bits=4, recent_keys=0),
    "recent keys alone": SquatConfig(
        activation_bits=8, site_bits={"k": 4}, recent_keys=5, wide_first_token=False
    ),
    "minmax": SquatConfig(method="minmax"),
    "pact": SquatConfig(method="pact"),
    "nipq": SquatConfig(method="nipq", activation_bits=4),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(["the cat sat on the mat, and the dog ran away."] * 50), 300)


def _pairs():
    """Every setting with every model; of each setting the fast tests have one model, in turn."""
    for place, (label, config) in enumerate(CONFIGS.items()):
        for turn, name in enumerate(TINY):
            marks = () if place % len(TINY) == turn else pytest.mark.slow
            yield pytest.param(config, name, marks=marks, id=f"{label}-{name}")


@pytest.mark.parametrize(("config", "name"), _pairs())
def test_the_engine_computes_the_same_bits(config, name, tokenizer, tmp_path):
    model = tiny_model(name, vocab_size=len(tokenizer))
    quantize(model, config, calibration=[some_ids(8, 32)]).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, "tiny", file)
    ids = some_ids(3, 60)
    parity = compare(model, tokenizer, str(file), ids.tolist())
    assert parity.holds
    assert (parity.differing, parity.largest) == (0, 0.0)
    engine = Engine(file)
    with torch.no_grad():
        expected = model(ids[:1], output_hidden_states=True)
    assert np.array_equal(engine.logits(ids[0]), expected.logits[0])
    assert np.array_equal(engine.hidden_states(ids[0]), expected.hidden_states[-1][0])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in TINY])
def test_so_it_does_of_every_architecture(name, tokenizer, tmp_path):
    model = tiny_model(name, vocab_size=len(tokenizer))
    with torch.no_grad():  # norms and biases say something, too
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    quantize(model, calibration=[some_ids(8, 32)]).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, "tiny", file)
    assert GGUFReader(file).fields["general.name"].contents() == "tiny"
    parity = compare(model, tokenizer, str(file), some_ids(3, 60).tolist())
    assert parity.holds
    assert (parity.differing, parity.largest) == (0, 0.0)


def _shape(hidden, ffn, heads, kv_heads, head_dim):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads}
    return {**sizes, "num_key_value_heads": kv_heads, "head_dim": head_dim}


ODD_SHAPES = {
    # Nothing is a multiple of 32, some are of nothing but 2; heads of a size of their own.
    "qwen3": [_shape(44, 58, 3, 1, 10), _shape(35, 67, 6, 3, 22), _shape(96, 112, 3, 3, 80)],
    "smollm3": [_shape(30, 50, 5, 1, 6), _shape(132, 70, 3, 1, 44)],
    "gemma3_text": [_shape(39, 53, 3, 1, 14), _shape(70, 98, 7, 7, 18), _shape(66, 40, 2, 1, 96)],
    "granite": [_shape(54, 51, 3, 3, 18), _shape(210, 55, 7, 1, 30)],
    "olmo2": [_shape(42, 59, 7, 1, 6), _shape(108, 75, 9, 3, 12)],
    "lfm2": [_shape(42, 70, 3, 1, 14), _shape(110, 81, 5, 5, 22), _shape(160, 60, 2, 1, 80)],
    "gpt_neox": [_shape(42, 61, 3, 3, 14), _shape(240, 66, 3, 3, 80)],
}


@pytest.mark.parametrize(
    ("tied", "bits"),
    [
        (False, "4:8"),
        (True, 4),
        pytest.param(False, 4, marks=pytest.mark.slow),
        pytest.param(True, "4:8", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in ODD_SHAPES.items() for shape in shapes]
)
def test_so_it_does_of_sizes_of_no_kind(name, shape, tied, bits, tokenizer, tmp_path):
    if name == "gpt_neox":  # an even number of a head's elements is rotated
        shape = {**shape, "rotary_pct": 0.43}
    model = tiny_model(name, vocab_size=len(tokenizer), tie_word_embeddings=tied, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    config = SquatConfig(activation_bits=bits)
    quantize(model, config, calibration=[some_ids(8, 32)]).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, "tiny", file)
    parity = compare(model, tokenizer, str(file), some_ids(2, 40).tolist())
    assert (parity.differing, parity.largest) == (0, 0.0)


@pytest.mark.parametrize(
    ("kinds", "bits"), [("caca", "4:8"), ("caca", 4), ("caca", 8), ("ccac", "4:8"), ("aacc", "4:8")]
)
def test_convolutions_beside_attention(kinds, bits, tokenizer, tmp_path):
    """Wherever they stand, over many times what they hold, in chunks, with the widths of before."""
    names = {"c": "conv", "a": "full_attention"}
    shape = {"num_hidden_layers": 4, "layer_types": [names[kind] for kind in kinds]}
    model = tiny_model(
        "lfm2", vocab_size=len(tokenizer), max_position_embeddings=1000, conv_L_cache=4, **shape
    )
    config = SquatConfig(activation_bits=bits)
    quantize(model, config, calibration=[some_ids(8, 32)]).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, "tiny", file)
    ids = some_ids(1, 700)
    parity = compare(model, tokenizer, str(file), ids.tolist())
    assert (parity.differing, parity.largest, parity.chunked) == (0, 0.0, True)
    engine = Engine(file)
    shares = []
    with torch.no_grad():
        expected = model(ids).logits[0]
        if bits == "4:8":
            shares = model.token_state.realised_share().tolist()
    engine.prefill(ids[0].tolist())
    if shares:
        first = kinds.index("a")
        assert engine.wide_share == pytest.approx([1.0] * first + shares)
        assert 0.1 < shares[-1] < 0.9
    engine.rewind(572)
    assert np.array_equal(engine.decode(int(ids[0, 572])), expected[572])
    engine.prefill(ids[0].tolist())
    with pytest.raises(EngineError, match=r"length: 300 of 700 tokens is too far back .* to 0"):
        engine.rewind(300)
    engine.rewind(0)
    assert np.array_equal(engine.prefill(ids[0, :9].tolist()), expected[8])
    assert np.array_equal(engine.decode(int(ids[0, 9])), expected[9])


def test_padding_is_not_convolved():
    model = tiny_model("lfm2")
    quantize(model, calibration=[some_ids(8, 32)]).eval()
    ids = some_ids(2, 20)
    padded = torch.cat([torch.zeros(2, 6, dtype=ids.dtype), ids], dim=1)
    seen = torch.cat([torch.zeros(2, 6, dtype=ids.dtype), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone = model(ids, position_ids=torch.arange(6, 26)[None]).logits
        behind = model(padded, attention_mask=seen, position_ids=torch.arange(26)[None]).logits
    assert torch.equal(behind[:, 6:], alone)


def _attend_to_nothing(module, query, *_, **__):
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register("nothing", _attend_to_nothing)
AttentionMaskInterface.register("nothing", lambda *_, **__: None)


@pytest.mark.parametrize("bits", [8, 4])
def test_more_than_65536_tokens(bits, tokenizer, tmp_path):
    """In a model of one layer, keys and values need no attention: PyTorch attends once, at the end."""
    model = tiny_model(
        vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=90000
    )
    with torch.no_grad():  # so sharp that single tokens get a probability
        model.model.layers[0].self_attn.q_proj.weight.mul_(15)
    # With peaks there are no such contexts, nor with powers of two.
    older = {
        "token_steps": "exponent",
        "softmax": "natural",
        "channel_scales": False,
        "reflections": False,
    }
    older |= {"key_centers": False, "wide_first_token": False}
    config = SquatConfig(activation_bits=bits, **older)
    quantize(model, config, calibration=[some_ids(8, 32)]).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, "tiny", file)
    ids, size = some_ids(1, 70000), 8192
    model.config._attn_implementation, cache = "nothing", DynamicCache()
    with torch.no_grad():
        for begin in range(0, 69997, size):
            end = min(begin + size, 69997)
            model(ids[:, begin:end], past_key_values=cache, logits_to_keep=1)
        model.config._attn_implementation = "squat"
        expected = model(ids[:, 69997:], past_key_values=cache).logits[0]
    engine = Engine(file)
    got = [engine.prefill(ids[0, :69998].tolist())]
    got += [engine.decode(token) for token in ids[0, 69998:].tolist()]
    assert np.array_equal(got, expected)
    engine.rewind(69998)
    assert np.array_equal(engine.decode(int(ids[0, 69998])), expected[1])
    ids[0, :4000] = some_ids(1, 4000, seed=1)
    assert not np.array_equal(engine.prefill(ids[0, :69998].tolist()), got[0])


@pytest.mark.parametrize("bits", ["4:8", 4, 8])
@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("mistral-window", {"sliding_window": 7}),
        ("mistral-window", {"sliding_window": 1}),
        ("qwen2-window", {"sliding_window": 70}),
        ("gemma3_text", {"sliding_window": 20, "head_dim": 10}),
    ],
)
def test_so_it_does_where_a_cache_holds_no_more_than_a_window(
    name, windows, bits, tokenizer, tmp_path
):
    shape = {"max_position_embeddings": 20_000, **windows}
    model = tiny_model(name, vocab_size=len(tokenizer), **shape)
    config = SquatConfig(activation_bits=bits)
    quantize(model, config, calibration=[some_ids(8, 32)]).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, "tiny", file)
    parity = compare(model, tokenizer, str(file), some_ids(1, 700).tolist())
    assert (parity.differing, parity.largest, parity.chunked) == (0, 0.0, True)
    # Window by window: two of three layers, or all.
    model.config.sliding_window = 20_000
    export(model, tokenizer, "tiny", tmp_path / "whole.gguf")
    small, whole = (Engine(f).info.cache_bytes for f in (file, tmp_path / "whole.gguf"))
    assert small < whole * (0.1 if name == "mistral-window" else 0.75)


@pytest.mark.parametrize("name", ["babylm-6m", "stories260k"])
@pytest.mark.parametrize(
    "config",
    [
        SquatConfig(),
        pytest.param(SquatConfig(weight_bits=8, activation_bits=8), marks=pytest.mark.slow),
        pytest.param(SquatConfig(activation_bits=4), marks=pytest.mark.slow),
    ],
    ids=["4:8", "w8a8", "w4a4"],
)
def test_real_models_on_real_text_too(name, config, tmp_path):
    folder = real_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (real_data() / "babylm/dev/simple_wiki.dev").read_text()[:6000]
    ids = tokenizer(text)["input_ids"]
    windows = [ids[i : i + 128] for i in range(0, 512, 128)]
    model = quantize(
        AutoModelForCausalLM.from_pretrained(folder), config, [torch.tensor(windows)]
    ).eval()
    file = tmp_path / "model.gguf"
    export(model, tokenizer, name, file)
    parity = compare(model, tokenizer, str(file), windows)
    assert parity.holds
    assert parity.largest == 0.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SquatConfig(policy="topk"), "topk"),
        (SquatConfig(weight_bits=5), "5 bits"),
        (SquatConfig(weight_bits=32), "weight_bits is 32"),
        (SquatConfig(embedding_bits=32), "embedding_bits is 32"),
        (SquatConfig(activation_bits=6), "'6' bits cannot be deployed"),
        (SquatConfig(method="pact-one-sided"), "unsigned"),
        (None, "not quantized"),
    ],
)
def test_what_cannot_be_deployed_is_refused(config, message, tokenizer, tmp_path):
    model = tiny_model(vocab_size=len(tokenizer))
    if config is not None:
        quantize(model, config, calibration=[some_ids(8, 32)])
    with pytest.raises(CheckpointError, match=message):
        export(model, tokenizer, "tiny", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'.*'silu'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'.*'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("lfm2", {"conv_bias": True}, "conv_bias is True"),
        ("lfm2", {"layer_types": ["conv"] * 3}, "layer_types: no layer has attention"),
    ],
)
def test_a_graph_that_the_engine_has_not_is_refused(name, overrides, message, tokenizer, tmp_path):
    model = tiny_model(name, vocab_size=len(tokenizer), **overrides)
    quantize(model, calibration=[some_ids(8, 32)])
    with pytest.raises(CheckpointError, match=message):
        export(model, tokenizer, "tiny", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_model_does_not_pass_for_parity(tokenizer, tmp_path):
    models = [
        quantize(tiny_model(seed=seed, vocab_size=len(tokenizer)), calibration=[some_ids()]).eval()
        for seed in (1, 2)
    ]
    file = tmp_path / "model.gguf"
    export(models[0], tokenizer, "tiny", file)
    parity = compare(models[1], tokenizer, str(file), some_ids(1, 30).tolist())
    assert not parity.holds
    assert parity.differing > 0
    assert describe(models[0], tokenizer, "tiny").vocab_size == len(tokenizer)
