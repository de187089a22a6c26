"""The very same file in llama.cpp: it loads, and computes nearly what the engine does at A8.

`make llama-cpp` builds llama-cpp-python's copy of llama.cpp; without it these tests say so and skip.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_models import Reference, Token, random_model
from squat.deploy.gguf import write_gguf
from squat.engine import Engine

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow


def llama_cpp_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    model = llama_cpp.Llama(str(path), n_ctx=len(ids), logits_all=True, verbose=False)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


class Unquantized(Reference):
    """The format's forward pass with activations that are as good as not quantized."""

    def quantize(
        self, x: NDArray[np.float32], site: str, layer: int, token: Token, center: object = None
    ) -> tuple[NDArray[np.int64], np.float32]:
        return np.rint(np.float64(x) * 2**20).astype(np.int64), np.float32(2**-20)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("weight_bits", "levels"), [(4, True), (4, False), (8, False)])
def test_random_models(tmp_path: Path, architecture: str, weight_bits: int, levels: bool) -> None:
    """Names, shapes, permutation of q and k, norms and biases are what llama.cpp expects.

    Random networks amplify the rounding of activations, in which llama.cpp and the engine differ: what both
    approximate is the comparison.
    """
    model = random_model(
        2,
        architecture,
        weight_bits=weight_bits,
        weight_levels=levels,
        activations="8",
        tied=architecture == "gpt2",
        biases=True,
        head_dim=16 if architecture == "gpt2" else 32,
    )
    write_gguf(tmp_path / "m.gguf", model)
    ids = [int(i) for i in np.random.default_rng(0).integers(3, 290, 60)]
    ours = Unquantized(model).logits(ids)
    theirs = llama_cpp_logits(tmp_path / "m.gguf", ids)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.95  # a wrong rotation or a missing bias ends near zero
    assert np.median(cosine) > 0.998


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_perplexity_of_a_trained_model(tmp_path: Path, weight_bits: int) -> None:
    """On real text within 1 % of the engine's at A8; and it tokenizes and generates."""
    if "SQUAT_DATA" not in os.environ:
        pytest.skip("needs real data: SQUAT_DATA is not set")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from squat.deploy.export import export
    from squat.quantization import SquatConfig, quantize

    data = Path(os.environ["SQUAT_DATA"])
    folder = data.parent / "models" / "babylm-6m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (data / "babylm" / "dev" / "simple_wiki.dev").read_text(encoding="utf-8")[:20000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [[1, *ids[i : i + 127]] for i in range(0, 127 * 20, 127)]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    # At other sites tensors are transformed whose names tell other programs to leave them alone, and
    # with reflections at attn_out as well.
    transforms = {"hadamard": ("attn_out", "k"), "reflections": False}
    config = SquatConfig(weight_bits=weight_bits, activation_bits=8, **transforms)
    model = quantize(model, config, [torch.tensor(windows[:4])]).eval()
    path = tmp_path / "m.gguf"
    export(model, tokenizer, "babylm-6m", path)

    def loss(logits: NDArray[np.float32], window: list[int]) -> float:
        rows = logits.astype(np.float64)[:-1]
        log_probs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
        return -float(np.mean(log_probs[np.arange(len(window) - 1), window[1:]]))

    engine = Engine(path)
    ours = np.mean([loss(engine.logits(w), w) for w in windows])
    theirs = np.mean([loss(llama_cpp_logits(path, w), w) for w in windows])
    assert abs(np.exp(theirs - ours) - 1) < 0.01

    other = llama_cpp.Llama(str(path), n_ctx=128, verbose=False)
    # Of a byte-level tokenizer llama.cpp does not know that it puts a space before the text.
    assert other.tokenize(f" {text}".encode()) == engine.tokenize(text)
    answer = other("Once upon a time", max_tokens=8, temperature=0.0)["choices"][0]["text"]
    assert answer.strip()


ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 16},
    "granite": {},
    "olmo2": {},
    "lfm2": {},
    "gpt_neox": {"hidden_act": "gelu_new"},
    "gpt_neox-sequential": {"hidden_act": "gelu_new"},
}
"""What departs from the tiny shape, so that it is what llama.cpp knows by the architecture's name."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_that_it_knows(tmp_path: Path, name: str) -> None:
    """W8A8, so that rounding is small: what a file says is what llama.cpp computes, too."""
    import torch

    from models import some_ids, tiny_model
    from squat.data.tokenizer import wrap_tokenizer
    from squat.deploy.export import export
    from squat.quantization import SquatConfig, quantize
    from tokenizer_kinds import byte_level_bpe

    tokenizer = wrap_tokenizer(byte_level_bpe())
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tokenizer)}
    model = tiny_model(name, initializer_range=0.1, **shape, **ARCHITECTURES[name])
    config = SquatConfig(weight_bits=8, activation_bits=8, hadamard=())
    quantize(model, config, [some_ids(8, 32)]).eval()
    export(model, tokenizer, name, tmp_path / "m.gguf")
    ids = some_ids(1, 48)
    theirs = llama_cpp_logits(tmp_path / "m.gguf", ids[0].tolist())
    with torch.no_grad():
        ours = model(ids).logits[0].numpy()
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert np.median(cosine) > 0.998
