"""The file: writing a model's integer codes to a .gguf and reading them back (docs/format.md).

`GgufModel` is what stands in such a file, in Hugging Face's order of rows; `write_gguf` writes the codes as
they are, without quantizing anything again. Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import IQ4_NL
from numpy.typing import NDArray

from squat.deploy.tokenizer import GgmlTokenizer, ggml_tokenizer
from squat.errors import CheckpointError

FORMAT_VERSION = 2
"""The version that is written; `read_codes` reads version 1 too."""
MIN_STEP = 2.0**-14
"""The smallest step: the smallest normal fp16 number."""
BLOCK = 32
"""Codes in a block."""
MAX_CONTEXT, MAX_CONTEXT_OF_ROWS = 131072, 65536
"""The most tokens that the engine's session holds, whatever a file's context length is; where tokens multiply
the steps by their peaks, half of that."""
GRAPH = "squat.graph"
"""Where the keys of a graph stand."""
TRANSFORMED = "_hadamard"
"""The end of a tensor's name where the matrix expects its input transformed."""

KEY_CENTER = "attn_k_center"
"""A layer's vector that is taken off its keys before they are quantized."""

TOKEN_SITES = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_mid")
"""The sites whose width may depend on the token."""
PREVIOUS_SITES = ("attn_in", "q", "k")
"""Of these, the ones that follow the previous layer's importance."""
ATTENTION_SITES = ("q", "k", "probs", "v")
"""The sites inside of an attention."""
IMPORTANCE = ("first_token", "relative_first_token", "value_peak", "rarity")
"""What decides a token's width in the engine."""
SITES = (*TOKEN_SITES, "probs", "head_in")
EXPONENT_SITES = ("attn_in", "q", "k", "attn_out", "mlp_in", "mlp_mid", "head_in")
"""The sites that may have token exponents."""
MAX_MARGIN = 7
HADAMARD_SITES = ("attn_in", "k", "attn_out", "mlp_in", "mlp_mid", "head_in")
"""The sites that may be transformed; at `k`, queries are as well."""
LEVEL_SITES = TOKEN_SITES
"""The sites whose 4-bit codes may stand for levels."""
LEVELS = 16
INPUTS = {
    "attn_q": "attn_in",
    "attn_k": "attn_in",
    "attn_v": "attn_in",
    "attn_qkv": "attn_in",
    "in_proj": "attn_in",
    "attn_output": "attn_out",
    "ffn_gate": "mlp_in",
    "ffn_up": "mlp_in",
    "ffn_down": "mlp_mid",
    "output": "head_in",
}
"""The site that a matrix multiplies, where that may be transformed."""


class Form(NamedTuple):
    """How a matrix is stored: the type of its blocks, the bits of a code, and the levels that codes mean."""

    type: GGMLQuantizationType
    bits: int
    levels: tuple[int, ...] | None = None


FORMS = {
    "q4": Form(GGMLQuantizationType.Q4_0, 4),
    "iq4_nl": Form(GGMLQuantizationType.IQ4_NL, 4, IQ4_NL.kvalues),
    "q8": Form(GGMLQuantizationType.Q8_0, 8),
}
"""By the end of the name that a tensor without blocks has."""


@dataclass
class CodeMatrix:
    """A quantized matrix or embedding.

    Args:
        codes: int8 [rows, inner]; where they mean levels, these.
        bits: 4 or 8.
        steps: [rows].
        levels: the sixteen levels of 4-bit codes, as in a row of `FORMS`.
    """

    codes: NDArray[np.int8]
    bits: int
    steps: NDArray[np.float32]
    levels: tuple[int, ...] | None = None

    @property
    def form(self) -> str | None:
        """The name of the row of `FORMS`, if there is one."""
        wanted = (self.bits, self.levels)
        return next((name for name, form in FORMS.items() if form[1:] == wanted), None)

    @classmethod
    def uniform(cls, codes: NDArray[np.int8], bits: int, step: float) -> CodeMatrix:
        """A matrix with the same step in every row."""
        return cls(codes, bits, np.full(len(codes), step, np.float32))


@dataclass
class GgufSite:
    """How a site quantizes (docs/format.md).

    Args:
        bits: "4", "8" or "4:8".
        step8, step4: a step for each layer (`head_in`: one). A width that the site never has: None. A step
            that one layer does not use: 0.
        margin8, margin4: of token exponents, for each width that the site ever has; None: every token has the
            same step.
        hadamard: by layer (`head_in`: one), the block by which the tensor is transformed, 1 where it is not;
            None: nowhere.
        levels4: by layer, the 16 levels of 4-bit codes, zeros where no token has 4 bits; None: codes are
            uniform.
    """

    bits: str
    step8: Sequence[float] | None = None
    step4: Sequence[float] | None = None
    margin8: int | None = None
    margin4: int | None = None
    hadamard: Sequence[int] | None = None
    levels4: Sequence[Sequence[int]] | None = None

    @property
    def has_exponents(self) -> bool:
        """Whether tokens may raise the step."""
        return (self.margin8, self.margin4) != (None, None)


@dataclass(frozen=True)
class GgufGraph:
    """What is computed beside the matrices (docs/format.md, "Graph"). The defaults are Llama's.

    Args:
        norm: "rms" or "layer".
        activation: "silu", "gelu_tanh" or "gelu".
        parallel: whether attention and MLP both read what a layer gets.
        pairs: "adjacent" or "halves": where the two elements of a rotated pair stand in a file, of the rows
            of q and k. In transformers each half of a head has one of them.
        rotated: elements of a head that are rotated; None: all.
        rope: transformers' `rope_parameters`.
        rotation: by layer, 0: not rotated, 1: by `rope`, 2: with `second_base`; None: 1 everywhere.
        second_base: theta of the layers of rotation 2.
        convolutions: by layer, 0: attention; otherwise a short convolution in its place, and how many tokens
            it mixes; None: 0 everywhere.
        windows: by layer, how many tokens a token attends to, itself among them; 0: all; None: 0 everywhere.
        embedding_scale: of embeddings before the first layer.
        attention_scale: of scores; None: 1 / sqrt(size of a head).
        residual_scale: of what attention and MLP add.
        logit_divisor: of logits.
    """

    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    parallel: bool = False
    pairs: Literal["adjacent", "halves"] = "adjacent"
    rotated: int | None = None
    rope: dict[str, Any] = field(default_factory=dict)
    rotation: Sequence[int] | None = None
    second_base: float | None = None
    convolutions: Sequence[int] | None = None
    windows: Sequence[int] | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    residual_scale: float = 1.0
    logit_divisor: float = 1.0

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return self.convolutions is None or self.convolutions[layer] == 0

    def rotated_of(self, head_size: int) -> int:
        """How many elements of a head are rotated."""
        return head_size if self.rotated is None else self.rotated


USUAL = {"gpt2": GgufGraph(norm="layer", activation="gelu_tanh", rotated=0)}
"""What a file need not say, by architecture; of every other it is what `GgufGraph()` says."""
KNOWN_ALONE = ("llama", "gpt2")
"""The architectures whose graph a reader knows by their name."""


@dataclass
class GgufModel:
    """Everything that a file holds.

    Args:
        architecture: `general.architecture`, as llama.cpp has it.
        matrices: by llama.cpp's names without ".weight": "token_embd", "output" (absent: tied),
            "blk.N.attn_q", "blk.N.attn_k", "blk.N.attn_v" (or "blk.N.attn_qkv", the rows of all three),
            "blk.N.attn_output" (of a convolution "blk.N.shortconv.in_proj" and ".out_proj"), "blk.N.ffn_gate"
            (where there is a gate), "blk.N.ffn_up", "blk.N.ffn_down", and for learned positions
            "position_embd". Rows are outputs, in Hugging Face's order.
        floats: norms and biases, float32, by llama.cpp's full names: "blk.N.attn_norm.weight",
            "blk.N.ffn_norm.weight", "output_norm.weight" (LFM2: "token_embd_norm.weight"), ".bias" of norms
            and matrices, and "blk.N.shortconv.conv.weight" [channels, taps].
        graph: what is computed beside them.
        keys: more of llama.cpp's keys, without the architecture's name in front.
        sites: all nine sites.
        peak_steps: whether tokens multiply the steps of all sites by their largest magnitudes.
        base2_softmax: whether attention's probabilities become codes without a step.
        thresholds, importance: given if any site is "4:8".
        token_ranks: of importance "rarity", each token's place in the vocabulary; the most frequent has 0.
        wide_first_token: whether a text's first token has 8 bits at the sites of its layers that are "4" or
            "4:8".
        recent_keys: of how many tokens, itself among them, a token sees the keys in 8 bits where "k" is "4"
            or "4:8"; with `peak_steps`.
        tokenizer_json: the text of tokenizer.json.
        bos_token_id: given also if the tokenizer puts nothing in front of a text.
        eos_token_ids: any of them ends an answer; the first one is for readers that know one only.
        chat_template: the Jinja program that makes a prompt of a conversation.
        special_tokens: by name, the texts of the tokens that it may write.
        chat_pieces: the template in pieces, keys below `squat.chat.`; empty if it has none.
    """

    architecture: str
    name: str
    hidden_size: int
    layers: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    matrices: dict[str, CodeMatrix]
    floats: dict[str, NDArray[np.float32]]
    sites: dict[str, GgufSite]
    tokenizer_json: str
    peak_steps: bool = False
    base2_softmax: bool = False
    thresholds: Sequence[float] | None = None
    importance: str | None = None
    token_ranks: Sequence[int] | None = None
    wide_first_token: bool = False
    recent_keys: int = 0
    graph: GgufGraph = field(default_factory=GgufGraph)
    keys: dict[str, float | int] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: Sequence[int] = ()
    pad_token_id: int | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_pieces: dict[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return len(self.matrices["token_embd"].codes)

    def widths(self, name: str) -> tuple[str, ...]:
        """The widths that tokens ever have a step for at a site."""
        bits = self.sites[name].bits
        if name == "probs" and self.base2_softmax:
            return ()
        wide_too = (self.wide_first_token and name in TOKEN_SITES) or (
            self.recent_keys > 0 and name == "k"
        )
        if bits == "4:8" or (bits == "4" and wide_too):
            return ("4", "8")
        return (bits,)

    def has_tokens(self, name: str, width: str, layer: int) -> bool:
        """Whether a token of a layer may have this width at the site `name`, whose bits allow it.

        All have 8 bits before the first attention.
        """
        if name in ATTENTION_SITES and not self.graph.attends(layer):
            return False
        if width == "8" or self.sites[name].bits != "4:8":
            return True
        first = next((i for i in range(self.layers) if self.graph.attends(i)), self.layers)
        return layer >= first + (name in PREVIOUS_SITES)

    def layer_shapes(
        self, fused: bool, gated: bool, attends: bool = True
    ) -> dict[str, tuple[int, int]]:
        """Name and [rows, inner] of a layer's matrices.

        Args:
            fused: whether queries, keys and values have one matrix.
            gated: whether the MLP has a gate.
            attends: whether it has attention, not a convolution.
        """
        hidden, ffn = self.hidden_size, self.ffn_size
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = (
            {"attn_qkv": (query + 2 * key, hidden)}
            if fused
            else {"attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden)}
        )
        shapes["attn_output"] = (hidden, query)
        if not attends:
            shapes = {
                "shortconv.in_proj": (3 * hidden, hidden),
                "shortconv.out_proj": (hidden, hidden),
            }
        if gated:
            shapes["ffn_gate"] = (ffn, hidden)
        return shapes | {
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }

    def expected_shapes(self) -> dict[str, tuple[int, int]]:
        """Name and [rows, inner] of every matrix that a model with these has, the head apart."""
        shapes = {"token_embd": (self.vocab_size, self.hidden_size)}
        if "position_embd" in self.matrices:
            shapes["position_embd"] = (self.context_length, self.hidden_size)
        fused = any(name.endswith(".attn_qkv") for name in self.matrices)
        gated = "blk.0.ffn_gate" in self.matrices
        for index in range(self.layers):
            layer = self.layer_shapes(fused, gated, self.graph.attends(index))
            shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
        return shapes


def permute_rope_rows(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a q or k matrix (or elements of its steps or bias) from Hugging Face's order to llama.cpp's.

    Hugging Face rotates element i of a head with element i + d/2, llama.cpp element 2i with 2i + 1: the
    halves of each head are interleaved.

    Args:
        rows: [heads * d, ...].
        heads: heads of this matrix.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute_rope_rows(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `permute_rope_rows`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def are_steps(values: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Which values fp16 holds exactly, as normal numbers (docs/format.md, "Numbers"); shape of values."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = values.astype(np.float16) == values
    return exact & (values >= MIN_STEP) & (values <= 65504)


def is_step(value: float) -> bool:
    """Whether `are_steps` holds of one number."""
    return bool(are_steps(np.array(value, np.float64)))


def _nibbles(matrix: CodeMatrix) -> NDArray[np.uint8]:
    """The 4-bit codes from 0 to 15; shape of the codes."""
    if matrix.levels is None:
        return (matrix.codes + np.int8(8)).view(np.uint8)
    return np.searchsorted(matrix.levels, matrix.codes).astype(np.uint8)


def _codes_of(nibbles: NDArray[np.uint8], levels: tuple[int, ...] | None) -> NDArray[np.int8]:
    """The inverse of `_nibbles`."""
    return np.array(range(-8, 8) if levels is None else levels, np.int8)[nibbles]


def pack_blocks(matrix: CodeMatrix) -> NDArray[np.uint8]:
    """The bytes of a matrix's blocks, [rows, bytes of a row], each with its row's step as its scale."""
    rows, inner = matrix.codes.shape
    shape = rows, inner // BLOCK, BLOCK
    halves = matrix.steps.astype(np.float16).view(np.uint8).reshape(rows, 1, 2)
    scales = np.broadcast_to(halves, (*shape[:2], 2))
    if matrix.bits == 8:
        body: NDArray[Any] = matrix.codes.reshape(shape).view(np.uint8)
    else:
        nibbles = _nibbles(matrix).reshape(shape)
        body = nibbles[..., :16] | nibbles[..., 16:] << 4
    return np.concatenate([scales, body], axis=2).reshape(rows, -1)


def pack_bytes(matrix: CodeMatrix) -> NDArray[np.int8]:
    """The rows of a tensor for an inner size that blocks do not divide (docs/format.md, "Tensors")."""
    if matrix.bits == 8:
        return matrix.codes
    nibbles = np.pad(_nibbles(matrix), ((0, 0), (0, matrix.codes.shape[1] % 2)), constant_values=8)
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int8)


def _check_matrix(name: str, matrix: CodeMatrix, shape: tuple[int, int]) -> None:
    if matrix.bits not in (4, 8):
        raise CheckpointError(
            f"{name}: weights of {matrix.bits} bits have no place in a GGUF file; train with 4 or 8"
        )
    if matrix.codes.dtype != np.int8 or matrix.codes.shape != shape:
        raise CheckpointError(
            f"{name}: codes are {matrix.codes.dtype} {list(matrix.codes.shape)}, expected int8 {list(shape)}"
        )
    if matrix.form is None:
        raise CheckpointError(f"{name}: levels {list(matrix.levels or ())} have no place in a file")
    limit = 2 ** (matrix.bits - 1)
    possible = range(-limit, limit) if matrix.levels is None else matrix.levels
    if not (good := np.isin(matrix.codes, possible)).all():
        found = int(matrix.codes[~good][0])
        means = f"{matrix.bits} bits" if matrix.levels is None else f"the levels of {matrix.form}"
        raise CheckpointError(f"{name}: a code of {found} does not fit {means}")
    if matrix.steps.dtype != np.float32 or matrix.steps.shape != shape[:1]:
        raise CheckpointError(
            f"{name}: steps are {matrix.steps.dtype} {list(matrix.steps.shape)}, "
            f"expected float32 [{shape[0]}]"
        )
    if not (good := are_steps(matrix.steps)).all():
        row = int(good.argmin())
        raise CheckpointError(
            f"{name}: step {matrix.steps[row]:.9g} of row {row} is no fp16 number of at least 2^-14"
        )


def _check_site(name: str, site: GgufSite, model: GgufModel) -> None:
    layers = 1 if name == "head_in" else model.layers
    choices = (
        ("4", "8", "4:8") if name in TOKEN_SITES else ("8",) if name == "probs" else ("4", "8")
    )
    if site.bits not in choices:
        raise CheckpointError(
            f"site {name}: {site.bits!r} bits cannot be deployed; choose {' or '.join(choices)}"
        )
    for width, steps in (("8", site.step8), ("4", site.step4)):
        used = width in model.widths(name)
        if used != (steps is not None):
            raise CheckpointError(
                f"site {name}: step{width} is {'missing' if used else 'given'} at {site.bits!r} bits"
            )
        if steps is None:
            continue
        if len(steps) != layers:
            raise CheckpointError(f"site {name}: {len(steps)} step{width}, expected {layers}")
        for layer, step in enumerate(steps):
            if not is_step(step) and model.has_tokens(name, width, layer):
                raise CheckpointError(
                    f"site {name}: step{width} of layer {layer} is {step!r}, "
                    f"no fp16 number of at least 2^-14"
                )


def _check_margins(name: str, site: GgufSite, model: GgufModel) -> None:
    if name not in EXPONENT_SITES:
        raise CheckpointError(f"site {name}: it has no token exponents, and so no margin")
    for width, margin in (("8", site.margin8), ("4", site.margin4)):
        used = width in model.widths(name)
        if used != (margin is not None):
            raise CheckpointError(
                f"site {name}: margin{width} is {'missing' if used else 'given'} at {site.bits!r} bits"
            )
        if margin is not None and margin not in range(MAX_MARGIN + 1):
            raise CheckpointError(
                f"site {name}: margin{width} is {margin}, not from 0 to {MAX_MARGIN}"
            )


def _check_hadamard(name: str, blocks: Sequence[int], model: GgufModel) -> None:
    if name not in HADAMARD_SITES:
        raise CheckpointError(f"site {name}: it cannot be transformed")
    layers = 1 if name == "head_in" else model.layers
    if len(blocks) != layers:
        raise CheckpointError(f"site {name}: {len(blocks)} hadamard, expected {layers}")
    sizes = {
        "k": model.head_dim,
        "attn_out": model.heads * model.head_dim,
        "mlp_mid": model.ffn_size,
    }
    size = sizes.get(name, model.hidden_size)
    for layer, block in enumerate(blocks):
        if block < 1 or size % block:
            raise CheckpointError(
                f"site {name}: hadamard of layer {layer} is {block}, which does not divide the size {size}"
            )


def _check_levels(name: str, levels: Sequence[Sequence[int]], model: GgufModel) -> None:
    if name not in LEVEL_SITES:
        raise CheckpointError(f"site {name}: it has no levels")
    if len(levels) != model.layers:
        raise CheckpointError(
            f"site {name}: levels4 of {len(levels)} layers, expected {model.layers}"
        )
    for layer, row in enumerate(levels):
        if model.sites[name].bits == "8" or not model.has_tokens(name, "4", layer):
            good, expected = list(row) == [0] * LEVELS, "zeros: no token has 4 bits there"
        else:
            good = len(row) == LEVELS and list(row) == sorted({*row} & {*range(-128, 128)})
            expected = f"{LEVELS} ascending numbers from -128 to 127"
        if not good:
            raise CheckpointError(
                f"site {name}: levels4 of layer {layer} are {list(row)}, expected {expected}"
            )


def _check(model: GgufModel) -> None:
    shapes = model.expected_shapes()
    if "output" in model.matrices:
        shapes["output"] = shapes["token_embd"]
    if shapes.keys() != model.matrices.keys():
        different = sorted(shapes.keys() ^ model.matrices.keys())
        raise CheckpointError(f"matrices: {different[0]} is missing or has no place in the model")
    for name, shape in shapes.items():
        _check_matrix(name, model.matrices[name], shape)
    if set(model.sites) != set(SITES):
        raise CheckpointError(
            f"sites: {sorted(set(model.sites) ^ set(SITES))[0]} is missing or unknown"
        )
    _check_special_tokens(model)
    for name, site in model.sites.items():
        _check_site(name, site, model)
        if site.has_exponents:
            _check_margins(name, site, model)
        if site.hadamard is not None:
            _check_hadamard(name, site.hadamard, model)
        if site.levels4 is not None:
            _check_levels(name, site.levels4, model)
    if any(site.bits == "4:8" for site in model.sites.values()):
        if model.importance not in IMPORTANCE:
            raise CheckpointError(
                f"importance: {model.importance!r} is unknown to the engine; it knows "
                + ", ".join(IMPORTANCE)
            )
        count = None if model.thresholds is None else len(model.thresholds)
        if count != model.layers or any(math.isnan(t) for t in model.thresholds or ()):
            raise CheckpointError(
                f"thresholds: {model.thresholds!r}, expected a number for each of {model.layers} layers"
            )
        counted = None if model.token_ranks is None else len(model.token_ranks)
        if counted != (model.vocab_size if model.importance == "rarity" else None):
            raise CheckpointError(
                f"token_ranks: of {counted} tokens, expected one for each of {model.vocab_size} where "
                "importance is rarity, and none elsewhere"
            )


def _check_special_tokens(model: GgufModel) -> None:
    ids = [("bos_token_id", model.bos_token_id), ("pad_token_id", model.pad_token_id)]
    ids += [("eos_token_id", index) for index in model.eos_token_ids]
    for name, index in ids:
        if index is not None and not 0 <= index < model.vocab_size:
            raise CheckpointError(
                f"{name}: {index} is outside the model's vocabulary of {model.vocab_size}; correct it in "
                "config.json and generation_config.json"
            )


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """What llama3's scaling divides each frequency by (transformers' modeling_rope_utils)."""
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _write_rope(writer: gguf.GGUFWriter, model: GgufModel) -> None:
    rope = model.graph.rope
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(model.graph.rotated_of(model.head_dim))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None}
        usual |= {"mscale_all_dim": None, "truncate": True}
        for key, value in usual.items():
            if rope.get(key, value) not in (value, None):
                raise CheckpointError(
                    f"rope_parameters: yarn with {key} = {rope[key]!r} is not supported"
                )
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or model.context_length
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, model.head_dim))
    elif kind != "default":
        raise CheckpointError(
            f"rope_parameters: rope_type {kind!r} is not supported; default, linear, llama3 and yarn are"
        )


def _write_hyperparameters(writer: gguf.GGUFWriter, model: GgufModel) -> None:
    writer.add_name(model.name)
    form = model.matrices["blk.0.ffn_down"].form
    assert form is not None
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{FORMS[form].type.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.ffn_size)
    writer.add_head_count(model.heads)
    if model.graph.norm == "rms":
        writer.add_layer_norm_rms_eps(model.norm_epsilon)
    else:
        writer.add_layer_norm_eps(model.norm_epsilon)
    if model.architecture == "gpt2":  # llama.cpp knows the rest of it
        return
    if model.graph.convolutions is None:
        writer.add_head_count_kv(model.kv_heads)
    else:  # llama.cpp knows by it which layers attend
        counts = [model.kv_heads * model.graph.attends(layer) for layer in range(model.layers)]
        _add_uint32s(writer, f"{model.architecture}.attention.head_count_kv", counts)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_vocab_size(model.vocab_size)
    for key, value in model.keys.items():
        if isinstance(value, bool):
            writer.add_bool(f"{model.architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{model.architecture}.{key}", value)
        else:
            writer.add_float32(f"{model.architecture}.{key}", value)
    _write_rope(writer, model)


def _graph_keys(model: GgufModel) -> dict[str, Any]:
    """What a file says of its graph: whatever is not usual."""
    usual = USUAL.get(model.architecture, GgufGraph())
    named = [f.name for f in fields(GgufGraph) if f.name not in ("rope", "rotated")]
    keys = {name: getattr(model.graph, name) for name in named}
    return {name: value for name, value in keys.items() if value != getattr(usual, name)}


def _write_graph(writer: gguf.GGUFWriter, model: GgufModel) -> None:
    for name, value in _graph_keys(model).items():
        if isinstance(value, str):
            writer.add_string(f"{GRAPH}.{name}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"{GRAPH}.{name}", value)
        elif isinstance(value, Sequence):
            _add_uint32s(writer, f"{GRAPH}.{name}", value)
        else:
            writer.add_float32(f"{GRAPH}.{name}", value)


def _floats(values: Sequence[float]) -> list[float]:
    return [float(v) for v in values]


def _add_uint32s(writer: gguf.GGUFWriter, key: str, values: Sequence[int]) -> None:
    """The writer's own method would make them signed."""
    array, uint32 = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
    writer.add_key_value(key, [int(value) for value in values], array, uint32)


def _features(model: GgufModel, tokenizer: GgmlTokenizer) -> list[str]:
    """What a reader must know to compute with a model."""
    sites = model.sites.values()
    present = {
        "graph": model.architecture not in KNOWN_ALONE or _graph_keys(model),
        "token_exponents": any(site.has_exponents for site in sites),
        "token_steps": model.peak_steps,
        "softmax": model.base2_softmax,
        "hadamard": any(site.hadamard is not None for site in sites),
        "key_centers": any(name.endswith(KEY_CENTER) for name in model.floats),
        "first_token": model.wide_first_token,
        "recent_keys": model.recent_keys > 0,
        "levels": any(site.levels4 is not None for site in sites),
        "tokenizer": tokenizer.beyond_ggml or len(model.eos_token_ids) > 1,
    }
    return [name for name, needed in present.items() if needed]


def _write_sites(writer: gguf.GGUFWriter, model: GgufModel) -> None:
    for name in SITES:
        site = model.sites[name]
        writer.add_string(f"squat.{name}.bits", site.bits)
        if site.step8 is not None:
            writer.add_array(f"squat.{name}.step8", _floats(site.step8))
        if site.step4 is not None:
            writer.add_array(f"squat.{name}.step4", _floats(site.step4))
        if site.margin8 is not None:
            writer.add_uint32(f"squat.{name}.margin8", site.margin8)
        if site.margin4 is not None:
            writer.add_uint32(f"squat.{name}.margin4", site.margin4)
        if site.hadamard is not None:
            _add_uint32s(writer, f"squat.{name}.hadamard", site.hadamard)
        if site.levels4 is not None:
            levels = [int(level) for row in site.levels4 for level in row]
            writer.add_array(f"squat.{name}.levels4", levels)
    if model.peak_steps:
        writer.add_string("squat.token_steps", "peak")
    if model.base2_softmax:
        writer.add_string("squat.softmax", "base2")
    if model.wide_first_token:
        writer.add_string("squat.first_token", "wide")
    if model.recent_keys:
        writer.add_uint32("squat.recent_keys", model.recent_keys)
    if model.thresholds is not None and model.importance is not None:
        writer.add_string("squat.importance", model.importance)
        writer.add_array("squat.threshold", _floats(model.thresholds))
        if model.token_ranks is not None:
            _add_uint32s(writer, "squat.token_ranks", model.token_ranks)


def _write_tokenizer(writer: gguf.GGUFWriter, model: GgufModel, tokenizer: GgmlTokenizer) -> None:
    bos = model.bos_token_id if tokenizer.bos is None else tokenizer.bos
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.model == "t5":
        array, float64 = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT64
        writer.add_key_value("squat.tokenizer.scores", tokenizer.scores, array, float64)
    for index, add in (
        (bos, writer.add_bos_token_id),
        (next(iter(model.eos_token_ids), None), writer.add_eos_token_id),
        (model.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unknown, writer.add_unk_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(tokenizer.bos is not None)
    writer.add_bool("tokenizer.ggml.add_space_prefix", tokenizer.add_space_prefix)
    if len(model.eos_token_ids) > 1:
        _add_uint32s(writer, "squat.tokenizer.eos_token_ids", model.eos_token_ids)
    writer.add_array("squat.tokenizer.normalizers", tokenizer.normalizers)  # without any: no key
    if tokenizer.prefix is not None:
        writer.add_string("squat.tokenizer.prefix", tokenizer.prefix)
    if tokenizer.flags:
        _add_uint32s(writer, "squat.tokenizer.added_tokens", list(tokenizer.flags))
        _add_uint32s(
            writer, "squat.tokenizer.added_token_flags", list(map(int, tokenizer.flags.values()))
        )
    writer.add_string("tokenizer.huggingface.json", model.tokenizer_json)
    if model.chat_template is not None:
        writer.add_chat_template(model.chat_template)
        writer.add_string("squat.tokenizer.special_tokens", json.dumps(model.special_tokens))
    for name, piece in model.chat_pieces.items():
        # add_string would leave out an empty one.
        writer.add_key_value(f"squat.chat.{name}", piece, gguf.GGUFValueType.STRING)


def _rope_heads(model: GgufModel, name: str) -> int | None:
    """Heads of a matrix or bias whose rows are permuted; None for all others."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])(\.bias)?", name)
    if model.graph.pairs != "adjacent" or match is None:
        return None
    return model.heads if match[1] == "q" else model.kv_heads


def _tensor_name(model: GgufModel, name: str) -> str:
    """A matrix of transformed inputs has a name that other programs do not take for theirs."""
    *block, kind = name.split(".")
    if kind == "token_embd" and "output" not in model.matrices:
        kind = "output"  # it is the head's, too
    if kind not in INPUTS or (sizes := model.sites[INPUTS[kind]].hadamard) is None:
        return name
    layer = int(block[1]) if block else 0
    return name + TRANSFORMED if sizes[layer] > 1 else name


def _write_tensors(writer: gguf.GGUFWriter, model: GgufModel) -> None:
    for name, matrix in model.matrices.items():
        heads = _rope_heads(model, name)
        if heads is not None:
            codes, steps = (permute_rope_rows(rows, heads) for rows in (matrix.codes, matrix.steps))
            matrix = replace(matrix, codes=codes, steps=steps)
        tensor, form = f"{_tensor_name(model, name)}.weight", matrix.form
        assert form is not None
        if matrix.codes.shape[1] % BLOCK == 0:
            writer.add_tensor(tensor, pack_blocks(matrix), raw_dtype=FORMS[form].type)
        else:
            writer.add_tensor(f"{tensor}.{form}", pack_bytes(matrix))
            writer.add_tensor(f"{tensor}.step", matrix.steps)
    for name, values in model.floats.items():
        heads = _rope_heads(model, name)
        values = np.asarray(values, np.float32)
        rows = values if heads is None else permute_rope_rows(values, heads)
        writer.add_tensor(name, rows)


def write_gguf(path: str | os.PathLike[str], model: GgufModel) -> None:
    """Write a model to a .gguf file, under a temporary name that is then renamed.

    Raises:
        CheckpointError: a part is missing, has the wrong shape, or cannot be expressed in the format; or
            the file cannot be written.
    """
    path = Path(path)
    _check(model)
    tokenizer = ggml_tokenizer(model.tokenizer_json, model.vocab_size)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        writer = gguf.GGUFWriter(temporary, model.architecture)
        writer.add_uint32("squat.format_version", FORMAT_VERSION)
        writer.add_array("squat.features", _features(model, tokenizer))  # without any: no key
        _write_hyperparameters(writer, model)
        _write_sites(writer, model)
        _write_graph(writer, model)
        _write_tokenizer(writer, model, tokenizer)
        _write_tensors(writer, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _unpack_blocks(
    data: NDArray[np.uint8], form: Form
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [rows, inner] and steps [rows] of rows of blocks [rows, bytes of a row]."""
    blocks = data.reshape(data.shape[0], -1, 2 + BLOCK * form.bits // 8)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if (different := scales != scales[:, :1]).any():
        row, block = np.argwhere(different)[0]
        raise CheckpointError(f"row {row} block {block} has another scale than the row's first one")
    body = np.ascontiguousarray(blocks[..., 2:])
    if form.bits == 4:
        codes = _codes_of(np.concatenate([body & 15, body >> 4], axis=2), form.levels)
    else:
        codes = body.view(np.int8)
    return codes.reshape(data.shape[0], -1), scales[:, 0].astype(np.float32)


def _unpack_bytes(data: NDArray[np.int8], form: Form, inner: int) -> NDArray[np.int8]:
    """Codes [rows, inner] of a tensor that `pack_bytes` made."""
    if form.bits == 8:
        return data
    pairs = np.stack([data.view(np.uint8) & 15, data.view(np.uint8) >> 4], axis=2)
    return _codes_of(pairs.reshape(data.shape[0], -1)[:, :inner], form.levels)


def read_codes(path: str | os.PathLike[str]) -> dict[str, CodeMatrix]:
    """The matrices of a file that `write_gguf` wrote, named and ordered as in `GgufModel.matrices`.

    In a file of version 1 the one step of a matrix is that of every row.

    Raises:
        CheckpointError: the file cannot be read, or is no Squat file of a version that is known.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF: {error}") from error
    if "squat.format_version" not in reader.fields:
        raise CheckpointError(f"{path}: is not a Squat file; write one with `squat export`")
    version = int(reader.fields["squat.format_version"].contents())
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: squat.format_version is {version}, but 1 to {FORMAT_VERSION} can be read; "
            "export the model again"
        )
    architecture = str(reader.fields["general.architecture"].contents())

    def number(key: str) -> int:
        return int(reader.fields[f"{architecture}.{key}"].contents())

    heads = number("attention.head_count")
    rope_heads = {}
    inner = {"ffn_down": number("feed_forward_length")}
    if f"{architecture}.attention.key_length" in reader.fields:
        inner["attn_output"] = heads * number("attention.key_length")
        if f"{GRAPH}.pairs" not in reader.fields:  # then they are adjacent
            rope_heads = {"attn_q": heads, "attn_k": number("attention.head_count_kv")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    by_type = {form.type: form for form in FORMS.values()}
    matrices = {}
    for full_name, tensor in tensors.items():
        stored_name, _, suffix = full_name.partition(".weight")
        name = stored_name.removesuffix(TRANSFORMED)
        kind = name.rpartition(".")[2]
        if (form := FORMS.get(suffix[1:])) is not None:
            width = inner.get(kind, number("embedding_length"))
            codes = _unpack_bytes(np.asarray(tensor.data), form, width)
            stored = np.asarray(tensors[f"{stored_name}.weight.step"].data, np.float32)
            expected = 1 if version == 1 else len(codes)
            if len(stored) != expected:
                raise CheckpointError(
                    f"{path}: tensor {stored_name}.weight.step has {len(stored)} elements, "
                    f"expected {expected}"
                )
            steps = np.resize(stored, len(codes))
        elif (form := by_type.get(tensor.tensor_type)) is not None:
            try:
                codes, steps = _unpack_blocks(np.asarray(tensor.data), form)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: tensor {full_name}: {error}") from None
        else:
            continue
        if kind in rope_heads:
            codes, steps = (unpermute_rope_rows(rows, rope_heads[kind]) for rows in (codes, steps))
        codes, steps = np.ascontiguousarray(codes), np.ascontiguousarray(steps)
        matrices[name] = CodeMatrix(codes, form.bits, steps, form.levels)
    return matrices
