"""The stopwatch: prompt and decoding speed of model files, as medians over interleaved rounds.

A round measures every candidate once, one after another, so that whatever else the machine does meanwhile
hits all of them alike. Prefill evaluates the prompt and returns logits for its last token only; decoding then
evaluates one token at a time behind it, with logits for each, as generation needs them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from squat.bench.shapes import find_shape, random_model
from squat.deploy.gguf import FORMS, TOKEN_SITES, TRANSFORMED, write_gguf
from squat.engine import Engine
from squat.errors import CheckpointError, ConfigError
from squat.terminal import progress

ROUNDS = 9
"""Rounds of a measurement, unless told otherwise."""
_LOADS = 5
_IMPORTANCE = (1.0, 1e5)
"""Bounds of what thresholds are searched for: the square of a value's peak over its mean square."""
_BISECTIONS = 16
"""Halvings of the bounds' logarithms: to 0.02 %."""


@dataclass(frozen=True)
class Settings:
    """What to measure: either `shape` with random weights, or a file `model`.

    Args:
        shape: a name from `SHAPES`.
        model: a .gguf file; its widths are its own.
        threads: one measurement for each number of threads ...
        activations: ... and each of these: "a8", "a4" or "4:8=SHARE", the share of tokens with 8 bits.
        weight_bits: 4 or 8, of the layers' matrices; None: 4.
        head_bits: 4 or 8, of head and embeddings; None: 8.
        isa: pins the instruction set.
        prompt: tokens of the prompt.
        generate: tokens to decode.
        rounds: measurements, of which the median counts.
    """

    shape: str | None = None
    model: Path | None = None
    threads: Sequence[int] = (1,)
    activations: Sequence[str] = ()
    weight_bits: int | None = None
    head_bits: int | None = None
    isa: str | None = None
    prompt: int = 128
    generate: int = 128
    rounds: int = ROUNDS


@dataclass(frozen=True)
class Measurement:
    """What was measured: tokens per second, the median over the rounds, and each round.

    `load_seconds`: the median of several times that the file was loaded, its pages being in memory.
    `wide_share`: the realised share of tokens with 8 bits, of models that decide it by token. `model_bytes`:
    the file's size; `weight_bytes`: the weights in memory, packed for the kernels.
    """

    shape: str
    isa: str
    threads: int
    weight_bits: int
    head_bits: int
    activations: str
    wide_share: float | None
    prompt: int
    generate: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_rounds: list[float]
    decode_rounds: list[float]
    load_seconds: float
    model_bytes: int
    weight_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def spread(rounds: Sequence[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = np.percentile(rounds, [25, 50, 75])
    return float((high - low) / middle)


def run(settings: Settings) -> list[Measurement]:
    """Measure; one result for each combination of activations and threads.

    Raises:
        ConfigError: a setting that does not exist or does not go with the others.
        CheckpointError: the file cannot be read.
        EngineError: the engine refuses the file, the instruction set or the lengths.
    """
    _check(settings)
    with tempfile.TemporaryDirectory(prefix="squat-bench-") as folder, _pinned(settings.isa):
        candidates = [
            _Candidate(file, settings, threads, activations)
            for file, activations in _files(settings, Path(folder))
            for threads in settings.threads
        ]
        with progress("measuring") as advance:
            for round_ in range(settings.rounds):
                for index, candidate in enumerate(candidates):
                    candidate.measure()
                    done = round_ * len(candidates) + index + 1
                    advance(done, settings.rounds * len(candidates))
        return [candidate.result() for candidate in candidates]


def profile(settings: Settings) -> list[dict[str, Any]]:
    """What each step of the graph costs, in prefill and in decoding; raises like `run`.

    Returns:
        A row for each candidate, phase and step: `share` of the phase's time, `ms` of a prompt or of a new
        token, `gmacs` (10^9 multiply-accumulates a second) and `gbs` (10^9 bytes read a second).
    """
    _check(settings)
    with tempfile.TemporaryDirectory(prefix="squat-bench-") as folder, _pinned(settings.isa):
        return [
            row
            for file, activations in _files(settings, Path(folder))
            for threads in settings.threads
            for row in _Candidate(file, settings, threads, activations).profile(settings.rounds)
        ]


def write_random_file(
    file: Path,
    shape: str,
    activations: str = "a8",
    weight_bits: int = 4,
    head_bits: int = 8,
    tokens: int = 256,
) -> None:
    """Write a model of random weights; of "4:8=SHARE", with thresholds that realise the share.

    Args:
        file: the .gguf file.
        shape: a name from `SHAPES`.
        activations: "a8", "a4" or "4:8=SHARE".
        weight_bits: of the layers' matrices.
        head_bits: of head and embeddings.
        tokens: length of the text on which the share is realised: `random_tokens` of that number.

    Raises:
        ConfigError: a setting that does not exist.
    """
    bits, share = parse_activations(activations)
    thresholds = None if share is None else [1.0] * find_shape(shape).layers
    write_gguf(
        file,
        random_model(
            shape,
            weight_bits=weight_bits,
            head_bits=head_bits,
            activation_bits=bits,
            thresholds=thresholds,
        ),
    )
    if share is not None:
        _set_thresholds(file, share, random_tokens(find_shape(shape).vocab, tokens))


def random_tokens(vocab_size: int, count: int) -> NDArray[np.int32]:
    """The text that is evaluated: the same one for the same numbers."""
    return np.random.default_rng(1).integers(0, vocab_size, count, dtype=np.int32)


def parse_activations(text: str) -> tuple[str, float | None]:
    """The bits of the sites, "4", "8" or "4:8", and the share of tokens with 8 bits, if it is a choice.

    Raises:
        ConfigError: the text says something else.
    """
    if text in ("a4", "a8"):
        return text[1:], None
    name, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if name != "4:8" or not 0 <= share <= 1:
        raise ConfigError(
            f"activations: {text!r} is unknown; choose a8, a4 or 4:8=SHARE, the share of tokens with "
            "8 bits from 0 to 1"
        )
    return name, share


def measurements_table(measurements: Sequence[Measurement]) -> Table:
    """One row a measurement."""
    first = measurements[0]
    table = Table(title=f"{first.shape}: {first.prompt} prompt tokens, {first.generate} generated")
    for heading in ("weights", "head", "activations", "isa"):
        table.add_column(heading)
    for heading in (
        "threads",
        "prefill, tokens/s ± %",
        "decode, tokens/s ± %",
        "file, MB",
    ):
        table.add_column(heading, justify="right")
    for m in measurements:
        share = "" if m.wide_share is None else f" ({m.wide_share:.2f} wide)"
        table.add_row(
            f"{m.weight_bits} bits",
            f"{m.head_bits} bits",
            m.activations + share,
            m.isa,
            str(m.threads),
            f"{m.prefill_tokens_per_s:,.0f} ± {100 * spread(m.prefill_rounds) / 2:.0f}",
            f"{m.decode_tokens_per_s:,.0f} ± {100 * spread(m.decode_rounds) / 2:.0f}",
            f"{m.model_bytes / 1e6:.1f}",
        )
    table.caption = (
        f"median of {len(first.prefill_rounds)} rounds ± half the interquartile range; "
        f"loaded in {1e3 * first.load_seconds:.0f} ms"
    )
    return table


def profile_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row a step, phases one after the other."""
    first = rows[0]
    table = Table(title=f"{first['shape']}, {first['isa']}: where the time goes")
    for heading in ("activations", "threads", "phase", "step"):
        table.add_column(heading)
    for heading in ("share", "ms", "GMAC/s", "GB/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("activations", "threads", "phase", "step")),
            f"{100 * row['share']:.1f} %",
            f"{row['ms']:.3f}",
            f"{row['gmacs']:.1f}" if row["gmacs"] else "",
            f"{row['gbs']:.1f}" if row["gbs"] else "",
        )
    table.caption = "ms: of the whole prompt; of one new token"
    return table


class _Candidate:
    """A file loaded with a number of threads, and what has been measured of it."""

    def __init__(self, file: Path, settings: Settings, threads: int, activations: str | None):
        self._prompt, self._generate = settings.prompt, settings.generate
        self._load: list[float] = []
        for _ in range(_LOADS):
            start = time.perf_counter()
            engine = Engine(file, threads=threads, context=settings.prompt + settings.generate)
            self._load.append(time.perf_counter() - start)
        self._engine = engine
        self._name, self._weight_bits, self._head_bits, own = _describe(file)
        self._activations = activations or own
        self._tokens = random_tokens(
            self._engine.info.vocab_size, settings.prompt + settings.generate
        )
        self._prefill: list[float] = []
        self._decode: list[float] = []
        self._seconds()  # pages in the weights, warms the caches

    def measure(self) -> None:
        prefill, decode = self._seconds()
        self._prefill.append(self._prompt / prefill)
        self._decode.append(self._generate / decode)

    def _read(self) -> None:
        self._engine.prefill(self._tokens[: self._prompt])

    def _continue(self) -> None:
        for token in self._tokens[self._prompt :].tolist():
            self._engine.decode(token)

    def _seconds(self) -> tuple[float, float]:
        begin = time.perf_counter()
        self._read()
        middle = time.perf_counter()
        self._continue()
        return middle - begin, time.perf_counter() - middle

    def profile(self, rounds: int) -> Iterator[dict[str, Any]]:
        phases: dict[str, Callable[[], None]] = {"prefill": self._read, "decode": self._continue}
        for phase, evaluate in phases.items():
            steps: list[dict[str, Any]] = []
            for _ in range(rounds):
                if phase == "decode":
                    self._read()
                self._engine.start_profile()
                evaluate()
                steps = _summed(steps, self._engine.profile())
            total = sum(step["seconds"] for step in steps)
            units = rounds * (1 if phase == "prefill" else self._generate)
            for step in steps:
                seconds = max(step["seconds"], 1e-12)
                yield {
                    "shape": self._name,
                    "isa": self._engine.info.isa,
                    "threads": self._engine.info.threads,
                    "activations": self._activations,
                    "phase": phase,
                    "step": step["step"],
                    "share": step["seconds"] / total,
                    "ms": 1e3 * step["seconds"] / units,
                    "gmacs": 1e-9 * step["macs"] / seconds,
                    "gbs": 1e-9 * step["bytes"] / seconds,
                }

    def result(self) -> Measurement:
        info = self._engine.info
        by_token = self._activations.startswith("4:8")
        return Measurement(
            shape=self._name,
            isa=info.isa,
            threads=info.threads,
            weight_bits=self._weight_bits,
            head_bits=self._head_bits,
            activations=self._activations,
            wide_share=statistics.fmean(self._engine.wide_share) if by_token else None,
            prompt=self._prompt,
            generate=self._generate,
            prefill_tokens_per_s=statistics.median(self._prefill),
            decode_tokens_per_s=statistics.median(self._decode),
            prefill_rounds=self._prefill,
            decode_rounds=self._decode,
            load_seconds=statistics.median(self._load),
            model_bytes=info.file_bytes,
            weight_bytes=info.weight_bytes,
        )


def _summed(counted: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two profiles of the engine together."""
    if not counted:
        return more
    return [
        {key: value if key == "step" else value + other[key] for key, value in step.items()}
        for step, other in zip(counted, more, strict=True)
    ]


def _check(settings: Settings) -> None:
    if (settings.shape is None) == (settings.model is None):
        raise ConfigError("bench: give either a .gguf file or --shape")
    if settings.model is not None:
        for name in ("activations", "weight_bits", "head_bits"):
            if getattr(settings, name) != getattr(Settings, name):
                raise ConfigError(f"{name}: a model file has its own; it goes with --shape only")
    if settings.shape is not None:
        find_shape(settings.shape)
    for activations in settings.activations:
        parse_activations(activations)
    for name in ("prompt", "generate", "rounds"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}: {getattr(settings, name)} is below 1")


def _files(settings: Settings, folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files to measure, and the activations that were asked for."""
    if settings.shape is None:
        assert settings.model is not None
        yield settings.model, None
        return
    for index, activations in enumerate(settings.activations or ("a8",)):
        file = folder / f"{index}.gguf"
        write_random_file(
            file,
            settings.shape,
            activations,
            4 if settings.weight_bits is None else settings.weight_bits,
            8 if settings.head_bits is None else settings.head_bits,
            settings.prompt + settings.generate,
        )
        yield file, activations


@contextmanager
def _pinned(isa: str | None) -> Iterator[None]:
    """The engine's own switch, for as long as the block runs."""
    before = os.environ.get("SQUAT_ISA")
    try:
        if isa is not None:
            os.environ["SQUAT_ISA"] = isa
        yield
    finally:
        if isa is not None:
            os.environ.pop("SQUAT_ISA")
            if before is not None:
                os.environ["SQUAT_ISA"] = before


def _describe(file: Path) -> tuple[str, int, int, str]:
    """Name, bits of the layers' weights and of the head, and activations of a Squat file."""
    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}

    def bits(*names: str) -> int | None:
        for name in (known for plain in names for known in (plain, plain + TRANSFORMED)):
            for suffix, form in FORMS.items():
                if kinds.get(f"{name}.weight") == form.type or f"{name}.weight.{suffix}" in kinds:
                    return form.bits
        return None

    layer, head = bits("blk.0.attn_output"), bits("output", "token_embd")
    if layer is None or head is None:
        raise CheckpointError(f"{file}: has no quantized matrices")
    widths = {str(reader.fields[f"squat.{site}.bits"].contents()) for site in TOKEN_SITES}
    activations = "by site"
    if len(widths) == 1:
        width = widths.pop()
        activations = width if width == "4:8" else f"a{width}"
    name = reader.fields["general.name"].contents() if "general.name" in reader.fields else ""
    return str(name) or file.stem, layer, head, activations


def _set_thresholds(file: Path, share: float, tokens: NDArray[np.int32]) -> None:
    """Give `share` of the tokens 8 bits in every layer, by bisection of all thresholds at once."""
    field = gguf.GGUFReader(file, "r+").fields["squat.threshold"]
    low, high = (np.full(len(field.data), bound) for bound in _IMPORTANCE)
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        for part, value in zip(field.data, middle, strict=True):
            field.parts[part][0] = value
        engine = Engine(file, context=len(tokens))
        engine.prefill(tokens)
        too_many = np.array(engine.wide_share) > share
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
