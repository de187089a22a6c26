"""Tiny models with random codes for the tests of the file and the engine, and a slow forward pass.

`Reference` follows docs/format.md word by word: no cache, one token after another, one head after another.
It shares no code with the exporter or the engine.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gguf.quants import IQ4_NL
from numpy.typing import NDArray
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from squat.deploy.gguf import (
    EXPONENT_SITES,
    LEVEL_SITES,
    LEVELS,
    MIN_STEP,
    SITES,
    TOKEN_SITES,
    USUAL,
    CodeMatrix,
    GgufGraph,
    GgufModel,
    GgufSite,
)

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "It's 1999, isn't it? We'll see; they've 12 apples.\n\nTwo\tnew  lines   and spaces. Ünïcödé ½ ﬁ 日本 "
)
Floats = NDArray[np.float32]


def byte_level_tokenizer(vocab_size: int = 300, prefix: bool = True) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return str(tokenizer.to_str())


def sentencepiece_tokenizer() -> str:
    """Llama's kind, with every way to make a token among the merges, as its converter writes them."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyzOLIS.,"]
    words = ["he", "in", "▁t", "▁a", "th", "▁th", "▁the", "er", "▁he", "ll", "ell", "▁a▁"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *pieces]
    ids = {text: index for index, text in enumerate(vocab)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in ids and word[cut:] in ids
    ]
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return str(tokenizer.to_str())


def half(value: float) -> float:
    """The nearest fp16 number."""
    return float(np.float16(value))


def random_levels(rng: np.random.Generator) -> list[int]:
    """Levels over the whole range, closer to each other about zero, as calibration finds them."""
    outer = rng.choice(np.arange(-128, 128), 10, replace=False)
    inner = rng.choice(np.setdiff1d(np.arange(-40, 40), outer), LEVELS - 10, replace=False)
    return sorted(int(level) for level in (*outer, *inner))


def random_blocks(rng: np.random.Generator, size: int, layers: int, multiple: int = 1) -> list[int]:
    """Numbers that divide the size, 1 or multiples of another one."""
    found = [b for b in range(1, size + 1) if size % b == 0 and (b == 1 or b % multiple == 0)]
    return [int(block) for block in rng.choice(found, layers)]


def random_site(
    rng: np.random.Generator,
    name: str,
    bits: str,
    layers: int,
    margins: tuple[int, int] | None = None,
    levels: bool = False,
    wide_first_token: bool = False,
) -> GgufSite:
    """A site whose steps suit the values; with margins (8, 4 bits) smaller ones, which tokens raise."""
    has_8 = "8" in bits or (wide_first_token and name in TOKEN_SITES)
    margins = margins if name in EXPONENT_SITES else None
    margin8, margin4 = margins or (0, 0)
    levels = levels and name in LEVEL_SITES and "4" in bits.split(":")
    scale = {"mlp_mid": 0.3, "attn_out": 0.5}.get(name, 1.0)
    wide, narrow = [], []
    for _ in range(layers):
        spread = rng.uniform(0.8, 1.2) * 3.0 * scale
        wide.append(half(max(spread / 2**margin8 / 127, MIN_STEP)))
        narrow.append(half(max(spread / 2**margin4 / (127 if levels else 7), MIN_STEP)))
    if name == "probs":
        wide = [half(1 / rng.uniform(240, 260)) for _ in range(layers)]
    table = [random_levels(rng) for _ in range(layers)] if levels else None
    if bits == "4:8" and name in ("attn_in", "q", "k"):
        narrow[0] = 0.0
        if table is not None:
            table[0] = [0] * LEVELS
    return GgufSite(
        bits,
        wide if has_8 else None,
        narrow if "4" in bits else None,
        margin8=margin8 if margins and has_8 else None,
        margin4=margin4 if margins and "4" in bits else None,
        levels4=table,
    )


def random_model(
    seed: int = 0,
    architecture: str = "llama",
    *,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    context: int = 96,
    weight_bits: int = 4,
    embedding_bits: int = 8,
    activations: str = "4:8",
    site_bits: dict[str, str] | None = None,
    tied: bool = True,
    biases: bool = False,
    row_steps: bool = True,
    margins: tuple[int, int] | None = None,
    hadamard: tuple[str, ...] = (),
    levels: bool = False,
    weight_levels: bool = False,
    key_centers: bool = False,
    wide_first_token: bool = False,
    importance: str = "relative_first_token",
    windows: list[int] | None = None,
    rope: dict[str, Any] | None = None,
    tokenizer_json: str | None = None,
) -> GgufModel:
    rng = np.random.default_rng(seed)
    tokenizer_json = tokenizer_json or byte_level_tokenizer()
    vocab = max(Tokenizer.from_str(tokenizer_json).get_vocab().values()) + 1
    gpt2 = architecture == "gpt2"
    kv_heads = heads if gpt2 else kv_heads

    def matrix(rows: int, inner: int, bits: int, size: float) -> CodeMatrix:
        limit = 2 ** (bits - 1)
        codes = rng.integers(-limit, limit, (rows, inner), dtype=np.int8)
        meaning = IQ4_NL.kvalues if weight_levels and bits == 4 else None
        if meaning is not None:
            limit, codes = 127, np.array(meaning, np.int8)[codes + 8]
        middle = size * math.sqrt(3) / limit
        if not row_steps:
            steps = np.full(rows, half(middle * rng.uniform(0.9, 1.1)), np.float32)
        else:
            steps = middle * rng.uniform(0.5, 1.5, rows)
        return CodeMatrix(codes, bits, steps.astype(np.float16).astype(np.float32), meaning)

    query, key = heads * head_dim, kv_heads * head_dim
    matrices = {"token_embd": matrix(vocab, hidden, embedding_bits, 1.0)}
    floats: dict[str, Floats] = {}

    def linear(name: str, rows: int, inner: int) -> None:
        matrices[name] = matrix(rows, inner, weight_bits, 1.5 / math.sqrt(inner))
        if biases or gpt2:
            floats[f"{name}.bias"] = rng.normal(0, 0.1, rows).astype(np.float32)

    def norm(name: str) -> None:
        floats[f"{name}.weight"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        if gpt2:
            floats[f"{name}.bias"] = rng.normal(0, 0.1, hidden).astype(np.float32)

    if gpt2:
        matrices["position_embd"] = matrix(context, hidden, embedding_bits, 0.3)
    if not tied:
        matrices["output"] = matrix(vocab, hidden, embedding_bits, 1 / math.sqrt(hidden))
    for layer in range(layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm")
        norm(block + "ffn_norm")
        if gpt2:
            linear(block + "attn_qkv", query + 2 * key, hidden)
        else:
            linear(block + "attn_q", query, hidden)
            linear(block + "attn_k", key, hidden)
            linear(block + "attn_v", key, hidden)
            linear(block + "ffn_gate", ffn, hidden)
        if key_centers:
            floats[block + "attn_k_center"] = rng.normal(0, 1, key).astype(np.float32)
        linear(block + "attn_output", hidden, query)
        linear(block + "ffn_up", ffn, hidden)
        linear(block + "ffn_down", hidden, ffn)
    norm("output_norm")
    bits = dict.fromkeys(SITES, activations) | {"probs": "8", "head_in": "8"} | (site_bits or {})
    adaptive = "4:8" in bits.values()
    sites = {
        name: random_site(
            rng,
            name,
            bits[name],
            1 if name == "head_in" else layers,
            margins,
            levels,
            wide_first_token,
        )
        for name in SITES
    }
    for name in hadamard:
        size = {"k": head_dim, "attn_out": query, "mlp_mid": ffn}.get(name, hidden)
        inner = head_dim & -head_dim if name == "attn_out" else 1
        count = 1 if name == "head_in" else layers
        sites[name].hadamard = random_blocks(rng, size, count, inner)
    model = GgufModel(
        architecture=architecture,
        name=f"random-{seed}",
        hidden_size=hidden,
        layers=layers,
        ffn_size=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        norm_epsilon=1e-5,
        matrices=matrices,
        floats=floats,
        sites=sites,
        tokenizer_json=tokenizer_json,
        thresholds=[float(t) for t in rng.uniform(0.7, 1.1, layers)] if adaptive else None,
        importance=importance if adaptive else None,
        token_ranks=[i * 7 % vocab for i in range(vocab)] if importance == "rarity" else None,
        wide_first_token=wide_first_token,
        graph=USUAL["gpt2"]
        if gpt2
        else GgufGraph(rope=rope or {"rope_type": "default", "rope_theta": 10000.0}),
        bos_token_id=1,
        eos_token_ids=[2],
        pad_token_id=0,
    )
    if windows is not None:
        model.graph = replace(model.graph, windows=windows)
    return model


def _frequencies(model: GgufModel) -> tuple[Floats, float]:
    """Frequencies in Hugging Face's order and the factor of cosine and sine, from its definitions."""
    rope, dim = model.graph.rope, model.head_dim
    base = rope["rope_theta"]
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inverse = np.float32(1) / (base ** exponent.astype(np.float64)).astype(np.float32)
    kind, factor = rope["rope_type"], rope.get("factor", 1.0)
    if kind == "linear":
        inverse = inverse / np.float32(factor)
    elif kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        scaled = []
        for f in inverse.astype(np.float64):
            length = 2 * math.pi / f
            smooth = (original / length - low) / (high - low)
            if length < original / high:
                scaled.append(f)
            elif length > original / low:
                scaled.append(f / factor)
            else:
                scaled.append((1 - smooth) * f / factor + smooth * f)
        inverse = np.array(scaled)
    elif kind == "yarn":
        original = rope["original_max_position_embeddings"]

        def turns_at(turns: float) -> float:
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low_dim, high_dim = max(math.floor(turns_at(32)), 0), min(math.ceil(turns_at(1)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low_dim) / max(high_dim - low_dim, 0.001), 0, 1)
        inverse = inverse / factor * ramp + inverse * (1 - ramp)
        return inverse.astype(np.float32), 0.1 * math.log(factor) + 1
    return inverse.astype(np.float32), 1.0


ONE = np.float32(1)


def exponential(x: Floats) -> Floats:
    """docs/format.md, "Numbers"; every literal a float32."""
    coefficients = (
        0.0013814539415761828,
        0.00836874544620514,
        0.04166838899254799,
        0.1666652113199234,
        0.4999999403953552,
    )
    x = np.clip(x, np.float32(-64), np.float32(64))
    n = (x * np.float32(1.44269504) + np.float32(12582912)) - np.float32(12582912)
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.full_like(r, coefficients[0])
    for coefficient in coefficients[1:]:
        p = p * r + np.float32(coefficient)
    return np.ldexp(p * r * r + r + ONE, n.astype(np.int32))


def sum64(x: Floats) -> np.float64:
    return np.float64(math.fsum(x.astype(np.float64)))


def hadamard_scale(power: int) -> np.float32:
    return np.float32(2.0 ** -math.floor(math.log2(power) / 2))


def hadamard(x: Floats, block: int, inner: int = 1) -> Floats:
    x = x.copy()
    power = block & -block
    distance = inner
    while distance < power:
        low = np.array([i for i in range(len(x)) if not i & distance])
        x[low], x[low + distance] = x[low] + x[low + distance], x[low] - x[low + distance]
        distance *= 2
    x *= hadamard_scale(power // inner)
    rest, prime, distance = block // power, 3, power
    while rest > 1:
        if rest % prime:
            prime += 2
            continue
        for first in range(len(x)):
            if first // distance % prime == 0:
                group = [first + k * distance for k in range(prime)]
                total = np.float32(0)
                for i in group:
                    total = total + x[i]
                total = total * np.float32(2 / prime)
                x[group] = x[group] - total
        rest //= prime
        distance *= prime
    return x


class Token(NamedTuple):
    """What decides a token's width: its importance, and whether it is the first one."""

    wide: bool
    first: bool


class Reference:
    """The forward pass of one sequence."""

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.wide: list[list[bool]] = []  # [layer][token]
        self.exponents: list[int] = []  # of all vectors, in the order of computation
        self.ids: list[int] = []

    def quantize(
        self, x: Floats, site: str, layer: int, token: Token, center: Floats | None = None
    ) -> tuple[NDArray[np.int64], np.float32]:
        """Codes of one token's vector and the step."""
        spec = self.model.sites[site]
        if spec.hadamard is not None and spec.hadamard[layer] > 1:
            size = self.model.head_dim
            x = hadamard(x, spec.hadamard[layer], size & -size if site == "attn_out" else 1)
        if site == "q" and (of_keys := self.model.sites["k"].hadamard) is not None:
            # Of the product of two such transforms B * scale^2 is left, which queries take off.
            power = of_keys[layer] & -of_keys[layer]
            left = np.float32(power * float(hadamard_scale(power)) ** 2)
            x = hadamard(x, of_keys[layer]) / left
        if center is not None:
            x = x - center
        first = token.first and self.model.wide_first_token and site in TOKEN_SITES
        bits = {"8": 8, "4": 8 if first else 4, "4:8": 8 if token.wide else 4}[spec.bits]
        levels = spec.levels4 is not None and bits == 4
        steps = spec.step8 if bits == 8 else spec.step4
        step = np.float32(steps[layer])  # type: ignore[index]
        qmax = 127 if levels else 2 ** (bits - 1) - 1
        margin = spec.margin8 if bits == 8 else spec.margin4
        if margin is not None:
            clip = float(step) * qmax * 2**margin
            fits = [e for e in range(32) if float(np.abs(x).max()) <= clip * 2**e]
            self.exponents.append(fits[0])
            step = step * np.float32(2 ** fits[0])
        codes = np.clip(np.rint(x * (ONE / step)), -qmax - 1, qmax).astype(np.int64)
        if levels:
            table = np.array(spec.levels4[layer])  # type: ignore[index]
            # Of equally near ones argmin takes the first, which is the lower one.
            codes = table[np.abs(codes[:, None] - table).argmin(axis=1)]
        return codes, step

    def linear(self, x: Floats, name: str, site: str, layer: int, token: Token) -> Floats:
        codes, step = self.quantize(x, site, layer, token)
        matrix = self.model.matrices[name]
        sums = matrix.codes.astype(np.int64) @ codes
        out = sums.astype(np.float32) * (step * matrix.steps)
        return out + self.model.floats.get(f"{name}.bias", np.float32(0))

    def norm(self, x: Floats, name: str) -> Floats:
        weight, epsilon = self.model.floats[f"{name}.weight"], np.float32(self.model.norm_epsilon)
        if self.model.architecture == "llama":
            mean_square = np.float32(sum64(x.astype(np.float64) ** 2) / len(x))
            return weight * (x * (ONE / np.sqrt(mean_square + epsilon)))
        mean = sum64(x) / len(x)
        variance = np.float32(sum64((x.astype(np.float64) - mean) ** 2) / len(x))
        scale = ONE / np.sqrt(variance + epsilon)
        return (x - np.float32(mean)) * scale * weight + self.model.floats[f"{name}.bias"]

    def rotate(self, x: Floats, position: int) -> Floats:
        """A head's vector in the order of the file: what was rotated together stands side by side."""
        if self.model.architecture != "llama":
            return x
        frequencies, factor = _frequencies(self.model)
        angle = np.concatenate([np.float32(position) * frequencies] * 2).astype(np.float64)
        first, second = np.split(x, 2)
        cosine = np.cos(angle).astype(np.float32) * np.float32(factor)
        sine = np.sin(angle).astype(np.float32) * np.float32(factor)
        rotated = x * cosine + np.concatenate([-second, first]) * sine
        return np.stack(np.split(rotated, 2), axis=1).ravel()

    def attention(self, inputs: list[Floats], layer: int, previous: list[Token]) -> list[Floats]:
        m = self.model
        block, dim = f"blk.{layer}.", m.head_dim
        query_size, key_size = m.heads * dim, m.kv_heads * dim
        queries, keys, values = [], [], []
        for position, x in enumerate(inputs):
            token = previous[position]
            if m.architecture == "gpt2":
                qkv = self.linear(x, block + "attn_qkv", "attn_in", layer, token)
                q, k, v = np.split(qkv, [query_size, query_size + key_size])
            else:
                q, k, v = (
                    self.linear(x, block + f"attn_{n}", "attn_in", layer, token) for n in "qkv"
                )
            queries.append(
                [
                    self.quantize(self.rotate(h, position), "q", layer, token)
                    for h in np.split(q, m.heads)
                ]
            )
            center = m.floats.get(block + "attn_k_center", np.zeros_like(k))
            keys.append(
                [
                    self.quantize(self.rotate(h, position), "k", layer, token, c)
                    for h, c in zip(
                        np.split(k, m.kv_heads), np.split(center, m.kv_heads), strict=True
                    )
                ]
            )
            values.append(np.split(v, m.kv_heads))

        probs = []  # [token][head][key]
        for position in range(len(inputs)):
            rows = []
            for head in range(m.heads):
                codes, step = queries[position][head]
                scores = []
                for other in range(position + 1):
                    key_codes, key_step = keys[other][head * m.kv_heads // m.heads]
                    product = np.float32(int(codes @ key_codes))
                    scores.append(product * (step * key_step) * np.float32(1 / math.sqrt(dim)))
                weights = exponential(np.array(scores, np.float32) - max(scores))
                rows.append(weights / np.float32(sum64(weights)))
            probs.append(rows)

        wide_now = []
        if m.thresholds is not None:
            for position, rows in enumerate(probs):
                importance = np.mean([row[0] for row in rows], dtype=np.float32)
                if m.importance == "relative_first_token":
                    importance *= np.float32(position + 1)
                if m.importance == "value_peak":
                    value = np.concatenate(values[position])
                    mean_square = np.float32(sum64(value.astype(np.float64) ** 2) / len(value))
                    importance = np.abs(value).max() ** 2 / (mean_square + np.float32(1e-30))
                if m.importance == "rarity":
                    importance = np.float32(m.token_ranks[self.ids[position]])
                wide_now.append(bool(importance >= np.float32(m.thresholds[layer])))
            wide_now[0] = wide_now[0] or m.wide_first_token
        else:
            wide_now = [True] * len(inputs)
        self.wide.append(wide_now)
        tokens = [Token(wide, i == 0) for i, wide in enumerate(wide_now)]

        outputs = []
        step_p = np.float32(m.sites["probs"].step8[layer])  # type: ignore[index]
        for rows in probs:
            out = []
            for head, row in enumerate(rows):
                codes = np.clip(np.rint(row * (ONE / step_p)), 0, 255).astype(np.int64)
                total = np.zeros(dim)  # float64: nothing is rounded before the end
                for other, p in enumerate(codes):
                    value = values[other][head * m.kv_heads // m.heads]
                    v_codes, v_step = self.quantize(value, "v", layer, tokens[other])
                    total += float(v_step) * (p * v_codes)
                out.append(float(step_p) * total)
            outputs.append(np.concatenate(out).astype(np.float32))
        return outputs

    def mlp(self, x: Floats, layer: int, token: Token) -> Floats:
        block = f"blk.{layer}."
        up = self.linear(x, block + "ffn_up", "mlp_in", layer, token)
        if self.model.architecture == "llama":
            gate = self.linear(x, block + "ffn_gate", "mlp_in", layer, token)
            middle = gate / (ONE + exponential(-gate)) * up
        else:
            inner = np.float32(1.59576912) * (up + np.float32(0.044715) * (up * up * up))
            middle = up / (ONE + exponential(-inner))
        return self.linear(middle, block + "ffn_down", "mlp_mid", layer, token)

    def logits(self, ids: list[int]) -> Floats:
        m = self.model
        self.ids = ids
        table = m.matrices["token_embd"]
        hidden = [table.codes[i].astype(np.float32) * table.steps[i] for i in ids]
        if (blocks := m.sites["head_in"].hadamard) is not None and "output" not in m.matrices:
            hidden = [hadamard(x, blocks[0]) for x in hidden]
        if m.architecture == "gpt2":
            learned = m.matrices["position_embd"]
            for position in range(len(ids)):
                row = learned.codes[position].astype(np.float32) * learned.steps[position]
                hidden[position] = hidden[position] + row
        previous = [Token(True, i == 0) for i in range(len(ids))]
        for layer in range(m.layers):
            block = f"blk.{layer}."
            inputs = [self.norm(x, block + "attn_norm") for x in hidden]
            attended = self.attention(inputs, layer, previous)
            tokens = [Token(wide, i == 0) for i, wide in enumerate(self.wide[layer])]
            for i, x in enumerate(attended):
                hidden[i] = hidden[i] + self.linear(
                    x, block + "attn_output", "attn_out", layer, tokens[i]
                )
                normed = self.norm(hidden[i], block + "ffn_norm")
                hidden[i] = hidden[i] + self.mlp(normed, layer, tokens[i])
            previous = tokens
        head = "output" if "output" in m.matrices else "token_embd"
        token = Token(True, False)
        rows = [self.linear(self.norm(x, "output_norm"), head, "head_in", 0, token) for x in hidden]
        return np.stack(rows)


def vocabulary(tokenizer_json: str) -> list[str]:
    return list(json.loads(tokenizer_json)["model"]["vocab"])
