"""The file: codes written are the codes read; what cannot be expressed is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import (
    half,
    random_model,
)
from squat.deploy.gguf import (
    FORMS,
    HADAMARD_SITES,
    CodeMatrix,
    GgufGraph,
    GgufModel,
    GgufSite,
    are_steps,
    is_step,
    pack_blocks,
    pack_bytes,
    permute_rope_rows,
    read_codes,
    unpermute_rope_rows,
    write_gguf,
)
from squat.errors import CheckpointError
from tokenizer_kinds import byte_level_bpe


def assert_same_codes(model: GgufModel, path: Path) -> None:
    read = read_codes(path)
    assert read.keys() == model.matrices.keys()
    for name, matrix in model.matrices.items():
        assert (read[name].bits, read[name].levels) == (matrix.bits, matrix.levels)
        assert read[name].steps.dtype == np.float32
        assert np.array_equal(read[name].steps, matrix.steps), name
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


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    architecture=st.sampled_from(["llama", "gpt2"]),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 16),
    ffn=st.integers(1, 70),
    weight_bits=st.sampled_from([4, 8]),
    row_steps=st.booleans(),
    tied=st.booleans(),
    margins=st.none() | st.tuples(st.integers(0, 7), st.integers(0, 7)),
    hadamard=st.sets(st.sampled_from(HADAMARD_SITES)),
    levels=st.booleans(),
    weight_levels=st.booleans(),
    key_centers=st.booleans(),
    wide_first_token=st.booleans(),
)
def test_any_model_is_read_as_it_was_written(
    seed: int, architecture: str, heads: int, pairs: int, hadamard: set[str], **options: Any
) -> None:
    model = random_model(
        seed,
        architecture,
        hidden=heads * 2 * pairs,
        heads=heads,
        kv_heads=1,
        head_dim=2 * pairs,
        layers=2,
        hadamard=tuple(hadamard),
        **options,
    )
    with TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "m.gguf", model)
        assert_same_codes(model, Path(folder) / "m.gguf")


# Sizes in blocks of 32 and others, some of which no power of two divides.
@pytest.mark.parametrize("sizes", [{}, {"ffn": 52}, {"hidden": 36, "ffn": 53}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_matrix_of_a_transformed_input_is_no_other_programs_tensor(
    tmp_path: Path, architecture: str, sizes: dict[str, int]
) -> None:
    model = random_model(3, architecture, biases=True, hadamard=HADAMARD_SITES, **sizes)
    model.sites["attn_in"].hadamard = [4, 1, 2]
    write_gguf(tmp_path / "m.gguf", model)
    assert_same_codes(model, tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    names = {tensor.name.partition(".weight")[0] for tensor in reader.tensors}
    for site, readers in {
        "attn_in": ("attn_q", "attn_k", "attn_v") if architecture == "llama" else ("attn_qkv",),
        "mlp_in": ("ffn_gate", "ffn_up") if architecture == "llama" else ("ffn_up",),
        "mlp_mid": ("ffn_down",),
    }.items():
        for layer, block in enumerate(model.sites[site].hadamard or ()):
            for name in readers:
                plain = f"blk.{layer}.{name}"
                assert (f"{plain}_hadamard" in names) == (block > 1)
                assert (plain in names) == (block == 1)
                assert f"{plain}.bias" in {tensor.name for tensor in reader.tensors}


@pytest.mark.parametrize("hidden", [64, 36])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_transformed_inputs_is_no_other_programs_either(
    tmp_path: Path, tied: bool, hidden: int
) -> None:
    model = random_model(3, hidden=hidden, tied=tied, hadamard=("k", "head_in"))
    for block in (1, 4):
        model.sites["head_in"].hadamard = [block]
        write_gguf(tmp_path / "m.gguf", model)
        assert_same_codes(model, tmp_path / "m.gguf")
        reader = GGUFReader(tmp_path / "m.gguf")
        names = {tensor.name.partition(".weight")[0] for tensor in reader.tensors}
        end = "" if block == 1 else "_hadamard"
        expected = {f"token_embd{end}"} if tied else {"token_embd", f"output{end}"}
        assert {name for name in names if "embd" in name or name.startswith("output")} == {
            "output_norm",
            *expected,
        }
        assert {"blk.0.attn_q", "blk.0.attn_k"} <= names  # another program computes the same


def test_version_1_had_one_step_a_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    query = CodeMatrix.uniform(rng.integers(-8, 8, (64, 32), dtype=np.int8), 4, 0.25)
    down = CodeMatrix.uniform(rng.integers(-8, 8, (32, 24), dtype=np.int8), 4, 0.5)
    name = "blk.0.ffn_down_hadamard.weight"
    for version, count in ((1, 1), (1, 32), (2, 32), (2, 1), (3, 1), (0, 1)):
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_uint32("squat.format_version", version)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(24)
        writer.add_head_count(4)
        writer.add_head_count_kv(4)
        writer.add_key_length(16)
        permuted = replace(query, codes=permute_rope_rows(query.codes, 4))
        writer.add_tensor(
            "blk.0.attn_q.weight", pack_blocks(permuted), raw_dtype=GGMLQuantizationType.Q4_0
        )
        writer.add_tensor(f"{name}.q4", pack_bytes(down))
        writer.add_tensor(f"{name}.step", down.steps[:count])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if version not in (1, 2):
            with pytest.raises(CheckpointError, match=f"format_version is {version}, but 1 to 2"):
                read_codes(tmp_path / "m.gguf")
        elif count != (1 if version == 1 else 32):
            with pytest.raises(CheckpointError, match=rf"{name}\.step has {count} elements"):
                read_codes(tmp_path / "m.gguf")
        else:
            read = read_codes(tmp_path / "m.gguf")
            for kind, matrix in (("attn_q", query), ("ffn_down", down)):
                assert np.array_equal(read[f"blk.0.{kind}"].codes, matrix.codes)
                assert np.array_equal(read[f"blk.0.{kind}"].steps, matrix.steps)


def test_a_row_of_several_scales_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model())
    reader = GGUFReader(tmp_path / "m.gguf", "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    tensor.data[7, 2 * 18] += 1
    reader.data.flush()
    with pytest.raises(
        CheckpointError, match=r"blk\.1\.ffn_down\.weight: row 7 block 2 has another"
    ):
        read_codes(tmp_path / "m.gguf")


def test_extreme_codes(tmp_path: Path) -> None:
    for bits in (4, 8):
        model = random_model(weight_bits=bits, embedding_bits=bits)
        for matrix in model.matrices.values():
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            matrix.codes[::2], matrix.codes[1::2] = low, high
        write_gguf(tmp_path / "m.gguf", model)
        assert_same_codes(model, tmp_path / "m.gguf")


def test_blocks_are_what_ggml_reads() -> None:
    """Dequantized by the gguf package, a block is code, or level, * the row's step."""
    from gguf.quants import dequantize

    rng = np.random.default_rng(0)
    for form in FORMS.values():
        codes = rng.integers(-(2 ** (form.bits - 1)), 2 ** (form.bits - 1), (5, 96), dtype=np.int8)
        if form.levels is not None:
            codes = np.array(form.levels, np.int8)[codes + 8]
        steps = rng.uniform(0.01, 0.02, 5).astype(np.float16).astype(np.float32)
        values = dequantize(
            pack_blocks(CodeMatrix(codes, form.bits, steps, form.levels)), form.type
        )
        assert np.array_equal(values, codes.astype(np.float32) * steps[:, None])


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


@given(st.lists(st.floats(width=16), min_size=1))
def test_steps_are_the_normal_positive_numbers_of_fp16(values: list[float]) -> None:
    expected = [2.0**-14 <= value <= 65504 for value in values]
    assert are_steps(np.array(values, np.float32)).tolist() == expected
    near = np.nextafter(np.array(values, np.float32), np.float32(np.inf))
    assert not are_steps(near).any()


def test_metadata(tmp_path: Path) -> None:
    model = random_model(biases=True, tokenizer_json=byte_level_bpe().to_str())
    write_gguf(tmp_path / "m.gguf", model)
    fields = {k: f.contents() for k, f in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["squat.format_version"] == 2
    beyond = ("features", ".margin8", ".margin4", ".hadamard", ".levels4")
    assert not any(key.endswith(beyond) for key in fields)
    assert fields["squat.importance"] == "relative_first_token"
    assert fields["squat.threshold"] == pytest.approx(model.thresholds)
    assert fields["squat.q.bits"] == "4:8"
    assert fields["squat.q.step4"] == model.sites["q"].step4
    assert fields["squat.head_in.step8"] == model.sites["head_in"].step8
    assert "squat.probs.step4" not in fields
    assert fields["tokenizer.huggingface.json"] == model.tokenizer_json
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.eos_token_id"] == 2


def features(path: Path) -> list[str]:
    field = GGUFReader(path).fields.get("squat.features")
    return [] if field is None else list(field.contents())


def test_features_are_named(tmp_path: Path) -> None:
    everything = {"margins": (0, 2), "hadamard": ("k", "mlp_mid", "head_in"), "levels": True}
    feature = {"margins": "token_exponents", "hadamard": "hadamard", "levels": "levels"}
    plain = byte_level_bpe().to_str()
    for options in (everything, *({name: value} for name, value in everything.items())):
        model = random_model(tokenizer_json=plain, **options)  # type: ignore[arg-type]
        write_gguf(tmp_path / "m.gguf", model)
        assert features(tmp_path / "m.gguf") == [feature[name] for name in options]
    for options in ({}, {"tokenizer_json": plain}):
        for ends in ([2], [2, 1]):
            model = replace(random_model(**options), eos_token_ids=ends)  # type: ignore[arg-type]
            write_gguf(tmp_path / "m.gguf", model)
            expected = [] if options and ends == [2] else ["tokenizer"]
            assert features(tmp_path / "m.gguf") == expected
    write_gguf(tmp_path / "m.gguf", model := random_model(**everything))  # type: ignore[arg-type]
    reader = GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items()}
    for name, site in model.sites.items():
        assert fields.get(f"squat.{name}.margin8") == site.margin8
        assert fields.get(f"squat.{name}.margin4") == site.margin4
        assert (site.margin8 == 0) == (name not in ("v", "probs"))
        assert (site.margin4 == 2) == (name not in ("v", "probs", "head_in"))
        assert fields.get(f"squat.{name}.hadamard") == site.hadamard
        levels = None if site.levels4 is None else [x for row in site.levels4 for x in row]
        assert fields.get(f"squat.{name}.levels4") == levels
    assert fields["squat.q.levels4"][:16] == [0] * 16
    assert reader.fields["squat.mlp_mid.hadamard"].types[1] == GGUFValueType.UINT32
    assert reader.fields["squat.mlp_mid.levels4"].types[1] == GGUFValueType.INT32


def change(model: GgufModel, name: str, **values: object) -> GgufModel:
    matrices = dict(model.matrices)
    matrices[name] = replace(matrices[name], **values)  # type: ignore[arg-type]
    return replace(model, matrices=matrices)


def site(model: GgufModel, name: str, value: GgufSite) -> GgufModel:
    return replace(model, sites={**model.sites, name: value})


def test_a_softmax_of_powers_of_two(tmp_path: Path) -> None:
    plain = byte_level_bpe().to_str()
    model = replace(random_model(tokenizer_json=plain), base2_softmax=True)
    write_gguf(tmp_path / "m.gguf", site(model, "probs", GgufSite("8")))
    assert features(tmp_path / "m.gguf") == ["softmax"]
    fields = {k: f.contents() for k, f in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["squat.softmax"] == "base2"
    assert fields["squat.probs.bits"] == "8"
    assert "squat.probs.step8" not in fields
    with pytest.raises(CheckpointError, match="site probs: step8 is given"):
        write_gguf(tmp_path / "m.gguf", model)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = random_model()
    up = "blk.0.ffn_up"
    codes, steps = model.matrices[up].codes, model.matrices[up].steps.copy()
    steps[7] = 0.1
    wide, levels = [0.5] * 3, [list(range(16))] * 3
    cases = [
        (change(model, up, bits=5), "blk.0.ffn_up: weights of 5 bits"),
        (change(model, up, steps=steps), "blk.0.ffn_up: step 0.1[0-9]* of row 7"),
        (change(model, up, steps=steps[:3]), r"blk.0.ffn_up: steps are float32 \[3\]"),
        (change(model, up, steps=steps.astype(float)), "blk.0.ffn_up: steps are float64"),
        (change(model, up, codes=codes[:-1]), r"blk.0.ffn_up: codes are int8 \[95, 64\]"),
        (change(model, up, codes=codes.astype(np.int32)), "codes are int32"),
        (change(model, up, codes=codes + np.int8(9)), "a code of 8 does not fit 4 bits"),
        (change(model, up, levels=(*range(16),)), "levels .* have no place in a file"),
        (
            change(model, up, levels=FORMS["iq4_nl"].levels),
            "a code of .* does not fit the levels of iq4_nl",
        ),
        (replace(model, matrices={**model.matrices, "extra": model.matrices[up]}), "extra"),
        (replace(model, thresholds=[1.0]), r"thresholds: \[1.0\]"),
        (replace(model, importance="topk"), "importance: 'topk'"),
        (replace(model, importance="rarity"), "token_ranks: of None tokens"),
        (replace(model, sites={}), "sites: attn_in"),
        (site(model, "v", GgufSite("5", [1.0] * 3)), "site v: '5' bits"),
        (site(model, "probs", GgufSite("4", None, [1.0] * 3)), "site probs: '4' bits"),
        (site(model, "v", GgufSite("8", [1.0] * 2)), "site v: 2 step8"),
        (site(model, "v", GgufSite("8")), "site v: step8 is missing"),
        (site(model, "v", GgufSite("8", [1.0, 0.1, 1.0])), "step8 of layer 1 is 0.1"),
        (site(model, "v", GgufSite("8", wide, margin8=1)), "site v: it has no token exponents"),
        (site(model, "q", GgufSite("8", wide, margin8=8)), "site q: margin8 is 8, not from 0 to 7"),
        (site(model, "q", GgufSite("4", None, wide, margin4=-1)), "site q: margin4 is -1"),
        (site(model, "q", GgufSite("8", wide, margin4=1)), "site q: margin8 is missing at '8'"),
        (
            site(model, "q", GgufSite("8", wide, margin8=1, margin4=1)),
            "site q: margin4 is given at '8'",
        ),
        (
            site(model, "q", GgufSite("4:8", wide, wide, margin8=1)),
            "site q: margin4 is missing at '4:8'",
        ),
        (site(model, "q", GgufSite("8", wide, hadamard=[2] * 3)), "site q: it cannot be"),
        (
            site(model, "k", GgufSite("8", wide, hadamard=[16, 1, 32])),
            "site k: hadamard of layer 2 is 32, which does not divide the size 16",
        ),
        (
            site(model, "head_in", GgufSite("8", [0.5], hadamard=[2] * 3)),
            "site head_in: 3 hadamard, expected 1",
        ),
        (site(model, "mlp_in", GgufSite("8", wide, hadamard=[2])), "site mlp_in: 1 hadamard"),
        (
            site(model, "mlp_mid", GgufSite("8", wide, hadamard=[32, 1, 64])),
            "site mlp_mid: hadamard of layer 2 is 64, which does not divide the size 96",
        ),
        (site(model, "mlp_in", GgufSite("8", wide, hadamard=[1, 0, 1])), "of layer 1 is 0"),
        (site(model, "mlp_in", GgufSite("8", wide, hadamard=[1, 1, 6])), "of layer 2 is 6"),
        (
            site(model, "head_in", GgufSite("4", None, [0.5], levels4=levels)),
            "site head_in: it has no levels",
        ),
        (
            site(model, "k", GgufSite("4:8", wide, wide, levels4=levels)),
            "site k: levels4 of layer 0 are .* expected zeros",
        ),
        (site(model, "q", GgufSite("4", None, wide, levels4=levels[:2])), "levels4 of 2 layers"),
        (site(model, "q", GgufSite("8", wide, levels4=levels)), "of layer 0 .* expected zeros"),
        (
            site(model, "q", GgufSite("4:8", wide, wide, levels4=levels)),
            "levels4 of layer 0 are .* expected zeros",
        ),
        *(
            (
                site(model, "q", GgufSite("4", None, wide, levels4=[levels[0], row, levels[2]])),
                "site q: levels4 of layer 1 are .* expected 16 ascending numbers from -128 to 127",
            )
            for row in ([0] * 16, [*range(14), 14, 14], [*range(113, 129)], [*range(15)])
        ),
        (
            replace(model, graph=GgufGraph(rope={"rope_type": "longrope"})),
            "rope_type 'longrope'",
        ),
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
