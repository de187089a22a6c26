"""The file: codes written are the codes read; what cannot be expressed is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from engine_models import (
    byte_level_tokenizer,
    half,
    random_model,
    sentencepiece_tokenizer,
)
from squat.deploy.gguf import (
    CodeMatrix,
    GgufModel,
    GgufSite,
    is_step,
    pack_blocks,
    permute_rope_rows,
    read_codes,
    unpermute_rope_rows,
    write_gguf,
)
from squat.deploy.tokenizer import TokenType, ggml_tokenizer
from squat.errors import CheckpointError


def assert_same_codes(model: GgufModel, path: Path) -> None:
    read = read_codes(path)
    assert read.keys() == model.matrices.keys()
    for name, matrix in model.matrices.items():
        assert read[name].bits == matrix.bits
        assert read[name].step == matrix.step
        assert read[name].codes.dtype == np.int8
        assert np.array_equal(read[name].codes, matrix.codes), name


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        # No inner size is a multiple of 32: the tensors that only this engine reads.
        ("llama", {"hidden": 40, "ffn": 53, "heads": 6, "kv_heads": 3, "head_dim": 6}),
        ("gpt2", {"hidden": 35, "ffn": 61, "heads": 5, "head_dim": 7}),
    ],
)
def test_codes_read_are_codes_written(
    tmp_path: Path, architecture: str, sizes: dict[str, int], weight_bits: int
) -> None:
    model = random_model(
        3,
        architecture,
        weight_bits=weight_bits,
        embedding_bits=12 - weight_bits,
        tied=False,
        **sizes,
    )
    write_gguf(tmp_path / "m.gguf", model)
    assert_same_codes(model, tmp_path / "m.gguf")


@pytest.mark.parametrize("ffn", [64, 52])
def test_a_transformed_down_projection_is_no_other_programs_tensor(
    tmp_path: Path, ffn: int
) -> None:
    model = replace(random_model(3, ffn=ffn), hadamard=4)
    write_gguf(tmp_path / "m.gguf", model)
    assert_same_codes(model, tmp_path / "m.gguf")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert any(name.startswith("blk.0.ffn_down_hadamard.weight") for name in names)
    assert not any("ffn_down." in name for name in names)
    for block in (0, 3, 128):
        with pytest.raises(CheckpointError, match=f"hadamard: {block} is no power of two"):
            write_gguf(tmp_path / "m.gguf", replace(model, hadamard=block))


def test_extreme_codes(tmp_path: Path) -> None:
    for bits in (4, 8):
        model = random_model(weight_bits=bits, embedding_bits=bits)
        for matrix in model.matrices.values():
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            matrix.codes[::2], matrix.codes[1::2] = low, high
        write_gguf(tmp_path / "m.gguf", model)
        assert_same_codes(model, tmp_path / "m.gguf")


def test_blocks_are_what_ggml_reads() -> None:
    """Dequantized by the gguf package, a block is code * step."""
    from gguf.quants import dequantize

    rng = np.random.default_rng(0)
    for bits, name in ((4, "Q4_0"), (8, "Q8_0")):
        from gguf import GGMLQuantizationType

        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 96), dtype=np.int8)
        matrix = CodeMatrix(codes, bits, half(0.0123))
        values = dequantize(pack_blocks(matrix), GGMLQuantizationType[name])
        assert np.array_equal(values, codes.astype(np.float32) * np.float32(matrix.step))


@given(heads=st.integers(1, 5), pairs=st.integers(1, 8), columns=st.integers(1, 3))
def test_permutation_pairs_the_halves_of_each_head(heads: int, pairs: int, columns: int) -> None:
    rows = np.arange(heads * 2 * pairs * columns).reshape(-1, columns)
    permuted = permute_rope_rows(rows, heads)
    for head in range(heads):
        own = rows[head * 2 * pairs : (head + 1) * 2 * pairs]
        for i in range(pairs):
            at = head * 2 * pairs + 2 * i
            assert np.array_equal(permuted[at], own[i])
            assert np.array_equal(permuted[at + 1], own[i + pairs])
    assert np.array_equal(unpermute_rope_rows(permuted, heads), rows)


def test_steps() -> None:
    assert is_step(2.0**-14)
    assert is_step(half(0.1))
    for value in (0.1, 0.0, -0.5, 2.0**-15, 1e6, float("nan"), float("inf")):
        assert not is_step(value)


def test_metadata(tmp_path: Path) -> None:
    model = random_model(biases=True)
    write_gguf(tmp_path / "m.gguf", model)
    fields = {k: f.contents() for k, f in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["squat.format_version"] == 1
    assert fields["squat.importance"] == "relative_first_token"
    assert fields["squat.threshold"] == pytest.approx(model.thresholds)
    assert fields["squat.q.bits"] == "4:8"
    assert fields["squat.q.step4"] == model.sites["q"].step4
    assert fields["squat.head_in.step8"] == model.sites["head_in"].step8
    assert "squat.probs.step4" not in fields
    assert fields["tokenizer.huggingface.json"] == model.tokenizer_json
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.eos_token_id"] == 2


def change(model: GgufModel, name: str, **values: object) -> GgufModel:
    matrices = dict(model.matrices)
    matrices[name] = replace(matrices[name], **values)  # type: ignore[arg-type]
    return replace(model, matrices=matrices)


def site(model: GgufModel, name: str, value: GgufSite) -> GgufModel:
    return replace(model, sites={**model.sites, name: value})


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = random_model()
    up = "blk.0.ffn_up"
    codes = model.matrices[up].codes
    cases = [
        (change(model, up, bits=5), "blk.0.ffn_up: weights of 5 bits"),
        (change(model, up, step=0.1), "blk.0.ffn_up: step 0.1"),
        (change(model, up, codes=codes[:-1]), r"blk.0.ffn_up: codes are int8 \[95, 64\]"),
        (change(model, up, codes=codes.astype(np.int32)), "codes are int32"),
        (change(model, up, codes=codes + np.int8(9)), "do not fit 4 bits"),
        (replace(model, architecture="opt"), "architecture: 'opt'"),
        (replace(model, matrices={**model.matrices, "extra": model.matrices[up]}), "extra"),
        (replace(model, thresholds=[1.0]), r"thresholds: \[1.0\]"),
        (replace(model, importance="topk"), "importance: 'topk'"),
        (replace(model, sites={}), "sites: attn_in"),
        (site(model, "v", GgufSite("5", [1.0] * 3)), "site v: '5' bits"),
        (site(model, "probs", GgufSite("4", None, [1.0] * 3)), "site probs: '4' bits"),
        (site(model, "v", GgufSite("8", [1.0] * 2)), "site v: 2 step8"),
        (site(model, "v", GgufSite("8")), "site v: step8 is missing"),
        (site(model, "v", GgufSite("8", [1.0, 0.1, 1.0])), "step8 of layer 1 is 0.1"),
        (replace(model, rope={"rope_type": "longrope"}), "rope_type 'longrope'"),
        (replace(model, tokenizer_json="{}"), "tokenizer.json: is not one"),
    ]
    for broken, message in cases:
        with pytest.raises(CheckpointError, match=message):
            write_gguf(tmp_path / "m.gguf", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, random_model())
    before = path.read_bytes()
    with pytest.raises(CheckpointError):
        write_gguf(path, replace(random_model(), tokenizer_json="no"))
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_gguf(tmp_path / "no" / "m.gguf", random_model())
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_reading_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing"):
        with pytest.raises(CheckpointError, match=name):
            read_codes(tmp_path / name)


def test_byte_level_tokenizer_keys() -> None:
    text = byte_level_tokenizer(290)
    tokenizer = ggml_tokenizer(text, 300)
    assert (tokenizer.model, tokenizer.pre) == ("gpt2", "gpt-2")
    assert tokenizer.nfkc
    assert tokenizer.add_space_prefix
    assert tokenizer.bos_token is None
    assert len(tokenizer.tokens) == len(tokenizer.types) == 300
    assert tokenizer.tokens[1] == "<s>"
    assert tokenizer.types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert tokenizer.tokens[299] == "[PAD299]"
    assert tokenizer.types[299] == TokenType.UNUSED
    assert not ggml_tokenizer(byte_level_tokenizer(prefix=False), 300).add_space_prefix


def test_sentencepiece_tokenizer_keys() -> None:
    text = sentencepiece_tokenizer()
    vocab = json.loads(text)["model"]["vocab"]
    tokenizer = ggml_tokenizer(text, len(vocab))
    assert tokenizer.model == "llama"
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.add_space_prefix
    assert tokenizer.types[:4] == [2, 3, 3, TokenType.BYTE]
    scores = dict(zip(tokenizer.tokens, tokenizer.scores, strict=True))
    assert scores["he"] > scores["▁t"] > scores["▁the"]


def edited(text: str, edit: str, value: object) -> str:
    data = json.loads(text)
    *path, last = edit.split(".")
    part = data
    for key in path:
        part = part[key]
    part[last] = value
    return json.dumps(data)


def test_tokenizers_that_cannot_be_expressed() -> None:
    byte_level, piece = byte_level_tokenizer(), sentencepiece_tokenizer()
    cases = [
        (edited(byte_level, "model.type", "Unigram"), "a Unigram model"),
        (edited(byte_level, "pre_tokenizer.use_regex", False), "another pattern"),
        (edited(byte_level, "normalizer", {"type": "Lowercase"}), "normalizer Lowercase"),
        (edited(byte_level, "model.ignore_merges", True), "ignores merges"),
        (edited(byte_level, "post_processor", {"type": "RobertaProcessing"}), "RobertaProcessing"),
        (edited(piece, "model.byte_fallback", False), "without byte fallback"),
        (edited(piece, "normalizer", {"type": "NFD"}), "its normalizer"),
    ]
    for text, message in cases:
        with pytest.raises(CheckpointError, match=message):
            ggml_tokenizer(text, 400)
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        ggml_tokenizer(byte_level, 20)
