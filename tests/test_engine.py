"""The engine against a slow implementation of docs/format.md, against itself, and against bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from engine_models import TEXT, Reference, random_model
from squat.deploy.gguf import HADAMARD_SITES, write_gguf
from squat.engine import Engine
from squat.errors import EngineError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
EVERYTHING = {
    "margins": (0, 1),
    "hadamard": HADAMARD_SITES,
    "levels": True,
    "weight_levels": True,
    "key_centers": True,
    "wide_first_token": True,
}
CASES = {
    "w4a8": ("llama", {"activations": "8"}),
    "w4a4": ("llama", {"activations": "4"}),
    "w4 4:8": ("llama", {}),
    "w8 4:8, 4-bit head of its own, biases": (
        "llama",
        {"weight_bits": 8, "embedding_bits": 4, "tied": False, "biases": True},
    ),
    "every site another width": (
        "llama",
        {"site_bits": {"mlp_mid": "8", "v": "4", "k": "8", "attn_out": "4", "head_in": "4"}},
    ),
    "no multiple of 32": (
        "llama",
        {"hidden": 40, "ffn": 53, "heads": 6, "kv_heads": 3, "head_dim": 6},
    ),
    "one key head": ("llama", {"kv_heads": 1}),
    "first_token": ("llama", {"importance": "first_token"}),
    "value_peak": ("llama", {"importance": "value_peak"}),
    "rarity": ("llama", {"importance": "rarity"}),
    "gpt2 value_peak": ("gpt2", {"importance": "value_peak"}),
    "linear rope": (
        "llama",
        {"rope": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    ),
    "llama3 rope": ("llama", {"rope": LLAMA3}),
    "yarn rope": ("llama", {"rope": YARN}),
    "gpt2 a8": ("gpt2", {"activations": "8"}),
    "gpt2 4:8": ("gpt2", {}),
    "gpt2 no multiple of 32": ("gpt2", {"hidden": 35, "ffn": 61, "heads": 5, "head_dim": 7}),
    "one step a matrix": ("llama", {"row_steps": False}),
    "exponents, nothing clipped": ("llama", {"margins": (0, 0)}),
    "exponents, much clipped": ("llama", {"margins": (3, 2)}),
    "transforms": ("llama", {"hadamard": HADAMARD_SITES}),
    "transformed keys": ("llama", {"hadamard": ("k",), "head_dim": 32}),
    "gpt2 transformed keys": ("gpt2", {"hadamard": ("k",), "head_dim": 24, "hidden": 96}),
    "transformed head": ("llama", {"hadamard": ("head_in",)}),
    "transformed head of its own": ("llama", {"hadamard": ("head_in",), "tied": False}),
    "transformed head, no multiple of 32": (
        "gpt2",
        {"hadamard": ("head_in",), "hidden": 40, "ffn": 53, "heads": 5, "head_dim": 8},
    ),
    "centers of keys": ("llama", {"key_centers": True}),
    "wide first token": ("llama", {"wide_first_token": True}),
    "wide first token, w4a4": ("llama", {"activations": "4", "wide_first_token": True}),
    "wide first token, other sites of other widths": (
        "llama",
        {"site_bits": {"v": "4", "q": "8", "mlp_in": "4"}, "wide_first_token": True},
    ),
    "levels": ("llama", {"levels": True}),
    "levels of weights": ("llama", {"weight_levels": True}),
    "levels of a head of its own": (
        "llama",
        {"weight_levels": True, "weight_bits": 8, "embedding_bits": 4, "tied": False},
    ),
    "gpt2 levels of weights and embeddings": (
        "gpt2",
        {"weight_levels": True, "embedding_bits": 4, "hidden": 35, "heads": 5, "head_dim": 7},
    ),
    "everything": ("llama", EVERYTHING),
    "everything w4a4": ("llama", {"activations": "4", **EVERYTHING}),
    "everything w4a8": ("llama", {"activations": "8", **EVERYTHING}),
    "everything, sizes of no kind": (
        "llama",
        {"hidden": 40, "ffn": 52, "heads": 6, "kv_heads": 3, "head_dim": 6, **EVERYTHING},
    ),
    "everything, large blocks": (
        "llama",
        {"hidden": 128, "ffn": 512, "weight_bits": 8, "biases": True, **EVERYTHING},
    ),
    "gpt2 everything": ("gpt2", EVERYTHING),
    "gpt2 everything w4a4": ("gpt2", {"activations": "4", **EVERYTHING}),
    "gpt2 everything w4a8": ("gpt2", {"activations": "8", **EVERYTHING}),
}


def random_ids(count: int, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 290, count)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.gguf"
    write_gguf(path, random_model(tied=False))
    return path


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(tmp_path: Path, name: str) -> None:
    architecture, options = CASES[name]
    ids = random_ids(33)
    shares = []
    for seed in range(3):
        model = random_model(seed, architecture, layers=2, **options)
        if model.importance == "first_token":
            model.thresholds = [0.05, 0.03]
        if model.importance == "value_peak":
            model.thresholds = [6.0, 7.0]
        if model.importance == "rarity":
            model.thresholds = [100.0, 150.0]
        write_gguf(tmp_path / "m.gguf", model)
        engine = Engine(tmp_path / "m.gguf", threads=2)
        logits = engine.logits(ids)
        reference = Reference(model)
        expected = reference.logits(ids)
        assert logits.dtype == np.float32
        assert np.array_equal(logits, expected)
        if model.sites["q"].has_exponents:
            assert len(set(reference.exponents)) >= 3  # or the test shows less than it seems to
        if model.thresholds is not None:
            share = [float(np.mean(wide)) for wide in reference.wide]
            assert engine.wide_share == pytest.approx(share)
            shares.append(float(np.mean(share)))
    assert not shares or 0.1 < float(np.mean(shares)) < 0.9


@pytest.mark.parametrize("windows", [[0, 0], [8, 0]])
def test_continuations_of_one_prompt(tmp_path: Path, windows: list[int]) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(2, layers=2, context=600, windows=windows))
    engine, alone = Engine(tmp_path / "m.gguf"), Engine(tmp_path / "m.gguf")
    prompt = random_ids(300)
    for given, ids in (
        (prompt, [7]),
        (prompt, random_ids(5, seed=1)),
        (prompt[:299], random_ids(9, seed=2)),
        ([*prompt, 5], random_ids(40, seed=3)),
        (prompt[:1], [3, 4]),
        (random_ids(20, seed=4), [9]),
    ):
        expected = alone.logits([*given, *ids])[len(given) - 1 : -1]
        assert np.array_equal(engine.logits_behind(given, ids), expected)
        assert engine.tokens == [*given, *ids[:-1]]
    for given, ids in (([], [1]), ([1], [])):
        with pytest.raises(EngineError, match="one of them has no tokens"):
            engine.logits_behind(given, ids)


@pytest.mark.parametrize("activations", ["4", "8", "4:8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_chunks_decoding_and_rewinding_give_identical_logits(
    tmp_path: Path, architecture: str, activations: str
) -> None:
    model = random_model(1, architecture, activations=activations, **EVERYTHING)  # type: ignore[arg-type]
    write_gguf(tmp_path / "m.gguf", model)
    engine = Engine(tmp_path / "m.gguf", threads=1)
    ids = random_ids(80)
    whole = engine.logits(ids)
    for chunk in (1, 7, 32):
        parts = list(engine.logits_in_chunks(ids, chunk))
        assert len(parts) == -(-len(ids) // chunk)
        assert np.array_equal(np.concatenate(parts), whole)
    for kept in (70, 33, 1):
        engine.prefill(ids[:kept] + random_ids(80 - kept, seed=6))
        engine.rewind(kept)
        assert np.array_equal([engine.decode(token) for token in ids[kept:]], whole[kept:])
    assert np.array_equal(Engine(tmp_path / "m.gguf", threads=3).logits(ids), whole)


def test_a_later_token_changes_no_earlier_logit(model_file: Path) -> None:
    engine = Engine(model_file)
    ids = random_ids(40)
    before = engine.logits(ids)
    ids[25] += 1
    after = engine.logits(ids)
    assert np.array_equal(before[:25], after[:25])
    assert not np.array_equal(before[25:], after[25:])


def test_greedy_generation_is_the_argmax_of_the_logits(model_file: Path) -> None:
    engine = Engine(model_file, threads=2)
    prompt = "Once upon a time"
    ids = engine.tokenize(prompt)
    for _ in range(20):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    assert 2 not in ids
    expected = engine.detokenize(ids)[len(prompt) + 1 :]  # the tokenizer put a space in front
    text = engine.generate(prompt, max_new_tokens=20)
    assert text.replace("\ufffd", "") == expected.replace("\ufffd", "")
    assert "".join(engine.generate(prompt, max_new_tokens=20, stream=True)) == text


def test_sampling_follows_the_seed(model_file: Path) -> None:
    engine = Engine(model_file)
    settings = {"max_new_tokens": 25, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    texts = [engine.generate("Lily", seed=seed, **settings) for seed in (1, 1, 2)]  # type: ignore[call-overload]
    assert texts[0] == texts[1] != texts[2]
    assert engine.generate("Lily", 25, temperature=2.0, top_k=1) == engine.generate("Lily", 25)
    penalized = engine.generate("Lily", 25, repetition_penalty=100.0)
    ids = engine.tokenize(penalized)
    assert len(set(ids)) > 15


def test_score_is_the_sum_of_log_probabilities(model_file: Path) -> None:
    engine = Engine(model_file)
    texts = [TEXT[:40], "a", "Lily loved to play."]
    for text, score in zip(texts, engine.score(texts), strict=True):
        ids = [1, *engine.tokenize(text)]  # behind bos
        logits = engine.logits(ids).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = sum(log_probs[i, ids[i + 1]] for i in range(len(ids) - 1))
        assert score == pytest.approx(expected, abs=1e-4)
    assert engine.score([]) == []


def test_info(model_file: Path) -> None:
    info = Engine(model_file, threads=2, context=50).info
    assert (info.architecture, info.vocab_size, info.layers) == ("llama", 300, 3)
    assert (info.context, info.threads, info.bos_token, info.eos_token) == (50, 2, 1, 2)
    assert info.file_bytes == model_file.stat().st_size
    assert set(info.kernels) == {"a8 w8", "a8 w4", "a4 w8", "a4 w4"}
    assert all(text.startswith("matmul_") for text in info.kernels.values())


def test_levels_have_kernels_of_their_own(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(levels=True, weight_bits=8))
    kernels = Engine(tmp_path / "m.gguf").info.kernels
    assert set(kernels) == {"a8 w8", "a8 t4"}  # what is on the left is 8 bits wide
    assert kernels["a8 t4"].startswith("matmul_a8_t4_")


def test_generation_ends_with_the_context(model_file: Path) -> None:
    engine = Engine(model_file, context=20)
    prompt = "Once upon a time"
    count = len(engine.tokenize(prompt))
    engine.generate(prompt, max_new_tokens=1000)
    assert count <= engine._native.length() <= 20
    assert engine.generate(prompt, max_new_tokens=0) == ""


@pytest.mark.parametrize("shared", [False, True])
def test_engines_in_threads(model_file: Path, shared: bool) -> None:
    first = Engine(model_file, threads=1)
    expected = first.generate("Lily", 30)
    results: list[str] = []

    def work() -> None:
        engine = first.share(threads=2) if shared else Engine(model_file, threads=2)
        results.extend(engine.generate("Lily", 30) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 12


def test_engines_that_share_a_model_have_sessions_of_their_own(model_file: Path) -> None:
    first = Engine(model_file, threads=1)
    text = first.generate("Lily", 30)
    other = first.share(threads=1, context=20)
    assert (other.tokens, other.info.context) == ([], 20)
    assert other.info.weight_bytes == first.info.weight_bytes
    stream = first.generate("Lily", 30, stream=True)
    begin = next(stream)
    assert text.startswith(other.generate("Lily", 5))
    assert begin + "".join(stream) == text
    del first
    assert text.startswith(other.share().generate("Lily", 5))
    with pytest.raises(EngineError, match="threads: -1 is out of range"):
        other.share(threads=-1)
    with pytest.raises(EngineError, match="context: 100000 is more than"):
        other.share(context=100_000)


def test_interleaved_streams_are_refused(model_file: Path) -> None:
    engine = Engine(model_file)
    stream = engine.generate("Lily", 30, stream=True)
    next(stream)
    engine.score(["another text"])
    with pytest.raises(EngineError, match="another call has used this engine"):
        list(stream)


BAD_CALLS = {
    "element 1 is 300": lambda e: e.logits([5, 300]),
    "element 0 is -1": lambda e: e.logits([-1]),
    "tokens: there are none": lambda e: e.logits([]),
    "ids: float64": lambda e: e.logits([1.5]),
    "ids: 3000000000": lambda e: e.logits([3_000_000_000]),
    "100 after the 0 in the session exceed the context of 96": lambda e: e.logits([5] * 100),
    "prompt: its": lambda e: e.generate("word " * 200),
    "texts: element 1: tokens": lambda e: e.score(["a", "word " * 200]),
    "texts: is one string": lambda e: e.score("a"),
    "max_new_tokens: -1": lambda e: e.generate("a", -1),
    "temperature is -1": lambda e: e.generate("a", temperature=-1.0),
    "top_p is 0": lambda e: e.generate("a", top_p=0.0),
    "top_k: -1": lambda e: e.generate("a", top_k=-1),
    "seed: -1": lambda e: e.generate("a", seed=-1),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(model_file: Path, message: str) -> None:
    engine = Engine(model_file)
    with pytest.raises(EngineError, match=message) as raised:
        BAD_CALLS[message](engine)
    assert "\n" not in str(raised.value)
    assert engine.generate("Lily", 3) == Engine(model_file).generate("Lily", 3)


def test_bad_files(tmp_path: Path, model_file: Path) -> None:
    data = model_file.read_bytes()
    files = {
        "cut.gguf": (data[: len(data) // 2], "cut short"),
        "long.gguf": (data + b"x" * 100, "100 bytes follow the last tensor"),
        "text.gguf": (b"hello", "not a GGUF file"),
        "empty.gguf": (b"", "is empty"),
        "version.gguf": (data[:4] + b"\x02" + data[5:], "GGUF version is 2"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EngineError, match=f"{name}: .*{message}"):
            Engine(tmp_path / name)
    with pytest.raises(EngineError, match=r"missing\.gguf"):
        Engine(tmp_path / "missing.gguf")
    with pytest.raises(EngineError, match="threads: -1"):
        Engine(model_file, threads=-1)
    with pytest.raises(EngineError, match="context: 97 is more than the 96"):
        Engine(model_file, context=97)

    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_context_length(128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineError, match=r"other\.gguf: is a GGUF file but not a Squat one"):
        Engine(tmp_path / "other.gguf")


def test_pinned_isa(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(30)
    expected = Engine(model_file).logits(ids)
    monkeypatch.setenv("SQUAT_ISA", "reference")
    pinned = Engine(model_file)
    assert pinned.info.isa == "reference"
    assert np.array_equal(pinned.logits(ids), expected)
    monkeypatch.setenv("SQUAT_ISA", "sse9")
    with pytest.raises(EngineError, match="SQUAT_ISA=sse9"):
        Engine(model_file)


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )


def test_running_a_model_loads_neither_torch_nor_transformers(model_file: Path) -> None:
    code = (
        "import sys; from squat.engine import Engine; Engine(sys.argv[1]).generate('a', 3);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code, str(model_file)).communicate()[0].strip() == "[]"


def test_interrupt_stops_a_generation(model_file: Path) -> None:
    code = (
        "import signal, sys; from squat.engine import Engine; engine = Engine(sys.argv[1])\n"
        # whoever runs the tests in the background may have left SIGINT ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n  print('ready', flush=True)\n  while True: engine.generate('Lily', 90)\n"
        "except KeyboardInterrupt: print('stopped', flush=True)"
    )
    process = run_python(code, str(model_file))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        assert process.communicate(timeout=30)[0] == "stopped\n"
    finally:
        process.kill()
    assert process.returncode == 0


def test_what_a_window_no_longer_holds_is_computed_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(2, layers=2, context=600, windows=[8, 0]))
    ids = random_ids(500)
    other = [*ids[:20], *random_ids(30, seed=7)]
    expected = Engine(tmp_path / "m.gguf").generate(other, 9)
    engine = Engine(tmp_path / "m.gguf")
    engine.prefill(ids)
    with pytest.raises(EngineError):
        engine.rewind(20)
    # And nothing has changed.
    assert np.array_equal(engine.decode(7), Engine(tmp_path / "m.gguf").prefill([*ids, 7]))
    engine.generate(ids, 4)
    answer = engine.generate(other, 9, stream=True)
    assert "".join(answer) == expected
    assert answer.reused_tokens == 0
