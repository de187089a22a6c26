"""Named shapes, one row each, and a model of random codes for any of them.

`llama-58m` and `gpt2-97m` are the paper's models (arXiv 2402.10787, section V), `llama-360m` a teacher of
theirs. The others span the sizes of a scaling study.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from squat.deploy.gguf import (
    PREVIOUS_SITES,
    SITES,
    USUAL,
    CodeMatrix,
    GgufGraph,
    GgufModel,
    GgufSite,
)
from squat.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `tied`: the head is the embedding."""

    architecture: Literal["llama", "gpt2"]
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    tied: bool
    context: int = 4096

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of all matrices of all layers: each is read once a token."""
        ffn_matrices = 3 if self.architecture == "llama" else 2
        return self.layers * self.hidden * (4 * self.hidden + ffn_matrices * self.ffn)

    @property
    def head_weights(self) -> int:
        """Weights of the head's matrix."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, norms and biases apart."""
        embeddings = self.head_weights * (1 if self.tied else 2)
        positions = self.context * self.hidden if self.architecture == "gpt2" else 0
        return self.layer_weights + embeddings + positions

    def prefill_macs(self, prompt: int) -> int:
        """Multiply-accumulates to evaluate a prompt, with logits for its last token only.

        A causal query multiplies with the keys up to its own, and so with (prompt + 1) / 2 on average.
        """
        attention = self.layers * self.hidden * prompt * (prompt + 1)
        return self.layer_weights * prompt + attention + self.head_weights


SHAPES: dict[str, Shape] = {
    "llama-6m": Shape("llama", 256, 6, 4, 704, 6000, tied=True),
    "llama-20m": Shape("llama", 384, 8, 6, 1024, 16000, tied=True),
    "llama-58m": Shape("llama", 512, 16, 8, 1024, 16000, tied=False),
    "llama-110m": Shape("llama", 768, 12, 12, 2048, 16000, tied=False),
    "llama-220m": Shape("llama", 1024, 16, 16, 2560, 16000, tied=False),
    "llama-360m": Shape("llama", 1024, 24, 8, 3072, 16000, tied=False),
    "llama-500m": Shape("llama", 1280, 23, 20, 3456, 16000, tied=False),
    "gpt2-97m": Shape("gpt2", 768, 12, 12, 3072, 16000, tied=True, context=1024),
}


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape: {name!r} is unknown; choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def random_model(
    name: str,
    *,
    weight_bits: int = 4,
    head_bits: int = 8,
    activation_bits: str = "8",
    thresholds: list[float] | None = None,
    seed: int = 0,
) -> GgufModel:
    """A model of random codes, with steps that keep its activations in the usual range.

    Args:
        name: of a shape.
        weight_bits: of the layers' matrices, 4 or 8.
        head_bits: of the head and the embeddings, 4 or 8.
        activation_bits: "4", "8" or "4:8".
        thresholds: of "4:8", one a layer.
        seed: equal seeds give equal models.

    Raises:
        ConfigError: an unknown shape, or bits other than these.
    """
    shape = find_shape(name)
    for what, bits in (("weight_bits", weight_bits), ("head_bits", head_bits)):
        if bits not in (4, 8):
            raise ConfigError(f"{what}: {bits} is not possible; choose 4 or 8")
    rng = np.random.default_rng(seed)
    model = GgufModel(
        architecture=shape.architecture,
        name=name,
        hidden_size=shape.hidden,
        layers=shape.layers,
        ffn_size=shape.ffn,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.head_dim,
        context_length=shape.context,
        norm_epsilon=1e-5,
        matrices={"token_embd": _matrix(rng, shape.vocab, shape.hidden, head_bits, 1.0)},
        floats={},
        sites={site: _site(site, activation_bits, shape.layers) for site in SITES},
        tokenizer_json=_tokenizer(shape.vocab),
        thresholds=thresholds,
        importance="value_peak" if thresholds is not None else None,
        graph=USUAL.get(shape.architecture, GgufGraph()),
    )
    gpt2 = shape.architecture == "gpt2"
    if gpt2:
        model.matrices["position_embd"] = _matrix(rng, shape.context, shape.hidden, head_bits, 0.1)
    for name, (rows, inner) in model.layer_shapes(fused=gpt2, gated=not gpt2).items():
        for matrix in (f"blk.{layer}.{name}" for layer in range(shape.layers)):
            spread = 1 / math.sqrt(inner)
            model.matrices[matrix] = _matrix(rng, rows, inner, weight_bits, spread)
            if gpt2:
                model.floats[f"{matrix}.bias"] = np.zeros(rows, np.float32)
    if not shape.tied:
        spread = 1 / math.sqrt(shape.hidden)
        model.matrices["output"] = _matrix(rng, shape.vocab, shape.hidden, head_bits, spread)
    norms = [f"blk.{i}.{norm}" for i in range(shape.layers) for norm in ("attn_norm", "ffn_norm")]
    for norm in (*norms, "output_norm"):
        model.floats[f"{norm}.weight"] = np.ones(shape.hidden, np.float32)
        if gpt2:
            model.floats[f"{norm}.bias"] = np.zeros(shape.hidden, np.float32)
    return model


def _half(value: float) -> float:
    return float(np.float16(value))


def _matrix(
    rng: np.random.Generator, rows: int, inner: int, bits: int, spread: float
) -> CodeMatrix:
    """Uniform codes of mean zero, whose values have the standard deviation `spread`.

    A mean of half a code would do, after some layers, to make all tokens alike.
    """
    most = 2 ** (bits - 1) - 1
    codes: NDArray[np.int8] = rng.integers(-most, most + 1, (rows, inner), dtype=np.int8)
    return CodeMatrix.uniform(codes, bits, _half(spread * math.sqrt(3) / (most + 0.5)))


def _site(name: str, activation_bits: str, layers: int) -> GgufSite:
    """Steps that cover a site's values: about four standard deviations."""
    if name == "probs":
        return GgufSite("8", step8=[_half(1 / 255)] * layers)
    bits, count = ("8", 1) if name == "head_in" else (activation_bits, layers)
    reach = {"attn_out": 1.0, "mlp_mid": 2.0}.get(name, 4.0)
    narrow = [_half(reach / 7)] * count
    if bits == "4:8" and name in PREVIOUS_SITES:
        narrow[0] = 0.0
    return GgufSite(
        bits,
        step8=[_half(reach / 127)] * count if "8" in bits else None,
        step4=narrow if "4" in bits else None,
    )


def _tokenizer(vocab_size: int) -> str:
    """A byte-level BPE of that many tokens: the bytes, and pairs of them in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in alphabet for b in alphabet][: vocab_size - len(alphabet)]
    tokens = alphabet + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return json.dumps(json.loads(tokenizer.to_str()))
