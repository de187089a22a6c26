"""Squat beside what people use today: same shapes, random weights, one machine, one run.

    python benchmarks/peers.py run  [--folder build/peers] [--rounds 5]
    python benchmarks/peers.py report [--folder build/peers] [--output docs/benchmarks]

`run` installs the peers into an environment of their own, prepares their models, and then measures: one
thread first, then two; for each, every shape; for each, rounds in which every peer has its turn, so that
other load on the machine hits all alike. Each turn is a process of its own, bound to as many CPUs as it has
threads, that warms up and reports the median of some repeats. Results are appended to a file as they come,
and `run` goes on where it was stopped. A peer that cannot be installed or prepared is named and left out.

`report` writes tables (Markdown and JSON) and figures from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build_llama_cpp
from peer_report import write_report

from squat.bench import SHAPES, write_random_file

HERE = Path(__file__).parent
SHAPE_NAMES = ("llama-58m", "gpt2-97m")
THREADS = (1, 2)
MARK = ".complete"
PACKAGES = ("transformers<5.6", "nncf", "requests", "openvino-genai==2026.4.1.0")
PACKAGES += ("onnxruntime-genai==0.18.0", "onnx-ir", "onnx")
ALONE = ("optimum-intel==2.2.0", "optimum==2.3.0")
"""Installed without what they ask for: torchvision, which they do not need here."""


@dataclass(frozen=True)
class Turn:
    """What is measured in one turn: tokens of a prompt, and behind it; how often."""

    threads: int
    prompt: int = 128
    generate: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class Peer:
    """Who is measured.

    name: in the tables. prepare(folder, shape, file): makes `file`, a file or a folder. measure(folder, file,
    turn): tokens per second of prefill and decoding. shapes: those that it can run.
    """

    name: str
    prepare: Callable[[Path, str, Path], None]
    measure: Callable[[Path, Path, Turn], dict[str, float]]
    shapes: tuple[str, ...] = SHAPE_NAMES


def output(command: list[Any], environment: dict[str, str] | None = None) -> str:
    """Standard output of a program; a failure says the last line of what it had to say."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:300] if lines else f"exit status {done.returncode}")
    return done.stdout


# ---- Squat ------------------------------------------------------------------------------------------


def squat(name: str, activations: str, weight_bits: int = 4, head_bits: int = 8) -> Peer:
    """A row for this engine."""

    def prepare(folder: Path, shape: str, file: Path) -> None:
        context = Turn(1).prompt + Turn(1).generate
        write_random_file(file, shape, activations, weight_bits, head_bits, context)

    def measure(folder: Path, file: Path, turn: Turn) -> dict[str, float]:
        program = [sys.executable, "-c", "from squat.cli import main; main()", "bench", file]
        options = ["--threads", turn.threads, "--prompt", turn.prompt, "--generate", turn.generate]
        (row,) = json.loads(output([*program, *options, "--rounds", turn.repeats, "--json", "-"]))
        return {"prefill": row["prefill_tokens_per_s"], "decode": row["decode_tokens_per_s"]}

    return Peer(f"Squat {name}", prepare, measure)


# ---- llama.cpp --------------------------------------------------------------------------------------


def llama(kind: str, cache: str = "f16") -> Peer:
    """A row for llama.cpp: an 8-bit file of ours, quantized by its own program to one of its types.

    cache: the type of its keys and values.
    """

    def prepare(folder: Path, shape: str, file: Path) -> None:
        programs = build_llama_cpp.build(folder, "llama-bench", "llama-quantize")
        source = file.with_name(f"{shape}.source.gguf")
        if not source.exists():
            write_random_file(source, shape, "a8", 8, 8)
        output([programs / "llama-quantize", "--allow-requantize", "--pure", source, file, kind])

    def measure(folder: Path, file: Path, turn: Turn) -> dict[str, float]:
        active = {"OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true"}
        active["OMP_NUM_THREADS"] = str(turn.threads)
        program = [folder / "build" / "bin" / "llama-bench", "-m", file, "-t", turn.threads]
        program += ["-fa", "on", "-ctk", cache, "-ctv", cache, "-r", turn.repeats, "-o", "json"]
        found = {}
        # Decoding begins behind a prompt, as everybody's does.
        for phase, test in (
            ("prefill", ["-p", turn.prompt, "-n", 0]),
            ("decode", ["-p", 0, "-n", turn.generate, "-d", turn.prompt]),
        ):
            (row,) = json.loads(output([*program, *test], active))
            found[phase] = statistics.median(row["samples_ts"])
        return found

    return Peer(f"llama.cpp {kind}", prepare, measure)


# ---- Python packages --------------------------------------------------------------------------------


def python(name: str, kind: str, shapes: tuple[str, ...] = SHAPE_NAMES) -> Peer:
    """A row for a peer that `peer_worker.py` knows, in the peers' environment."""

    def prepare(folder: Path, shape: str, file: Path) -> None:
        config = json.dumps(transformers_config(shape))
        output([interpreter(folder), HERE / "peer_worker.py", "prepare", kind, config, file])

    def measure(folder: Path, file: Path, turn: Turn) -> dict[str, float]:
        worker = [interpreter(folder), HERE / "peer_worker.py", "measure", kind, file]
        numbers = [turn.threads, turn.prompt, turn.generate, turn.repeats]
        text = output([*worker, *numbers], {"OMP_NUM_THREADS": str(turn.threads)})
        return dict(json.loads(text.splitlines()[-1]))

    return Peer(name, prepare, measure, shapes)


def interpreter(folder: Path) -> Path:
    """Python of the peers' environment, which is made if it is not there."""
    environment = folder / "venv"
    python = environment / "bin" / "python"
    if not (environment / MARK).exists():
        import torch

        venv.create(environment, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        output([*install, f"torch=={torch.__version__}", *PACKAGES])
        output([*install, "--no-deps", *ALONE])
        (environment / MARK).touch()
    return python


def transformers_config(name: str) -> dict[str, Any]:
    """A shape in transformers' words."""
    shape = SHAPES[name]
    common = {"vocab_size": shape.vocab, "tie_word_embeddings": shape.tied}
    common |= {"bos_token_id": 1, "eos_token_id": 2}
    if shape.architecture == "gpt2":
        sizes = {"n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads}
        return {"model_type": "gpt2", "n_positions": shape.context, **sizes, **common}
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.context,
        **common,
    }


PEERS = [
    squat("W8A8", "a8", weight_bits=8),
    squat("W4A8", "a8"),
    squat("W4A8, 4-bit head", "a8", head_bits=4),
    squat("W4 4:8 at 1:3", "4:8=0.75"),
    squat("W4 4:8 at 1:1", "4:8=0.5"),
    squat("W4 4:8 at 3:1", "4:8=0.25"),
    squat("W4A4", "a4"),
    *(llama(kind) for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_K")),
    python("OpenVINO int8", "openvino-8"),
    python("OpenVINO int4", "openvino-4"),
    # Its model builder does not know GPT-2.
    python("ONNX Runtime int8", "onnxruntime-8", shapes=("llama-58m",)),
    python("ONNX Runtime int4", "onnxruntime-4", shapes=("llama-58m",)),
    python("PyTorch bf16", "pytorch-bfloat16"),
]


# ---- The run ----------------------------------------------------------------------------------------


def prepared(peer: Peer, shape: str, folder: Path) -> Path | None:
    """The peer's model; None, and a line that says why, if it cannot be had."""
    name = f"{shape}.{peer.name}".replace(" ", "-").replace(",", "").replace(":", "-")
    file = folder / "models" / name
    mark = file.with_name(f"{name}{MARK}")
    if mark.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"preparing {peer.name}, {shape}", flush=True)
    try:
        peer.prepare(folder, shape, file)
    except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
        print(f"left out: {peer.name}, {shape}: {error}", flush=True)
        return None
    mark.touch()
    return file


def size(file: Path) -> int:
    """Bytes of a model's file, or of the largest part of its folder: the weights."""
    return file.stat().st_size if file.is_file() else max(f.stat().st_size for f in file.iterdir())


def turns(rounds: int) -> Iterator[tuple[int, str, int]]:
    """Threads, shape and round, in the order in which they are measured."""
    for threads in THREADS:
        for shape in SHAPE_NAMES:
            for round_ in range(rounds):
                yield threads, shape, round_


def limits_program(folder: Path) -> Path:
    """The program that measures the machine, built here."""
    out = folder / "native"
    output(["cmake", "-S", HERE.parent, "-B", out, "-DCMAKE_BUILD_TYPE=Release"])
    output(["cmake", "--build", out, "--target", "limits", "-j", "2"])
    return out / "limits"


def run(folder: Path, rounds: int) -> None:
    """Prepare everything, then measure what is not yet in the results."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        (peer.name, shape): prepared(peer, shape, folder)
        for peer in PEERS
        for shape in SHAPE_NAMES
        if shape in peer.shapes
    }
    limits = limits_program(folder)
    results = folder / "results.jsonl"
    done = set()
    if results.exists():
        for line in results.read_text().splitlines():
            row = json.loads(line)
            done.add((row["peer"], row["shape"], row["threads"], row["round"]))
    usable = sorted(os.sched_getaffinity(0))
    for threads, shape, round_ in turns(rounds):
        os.sched_setaffinity(0, usable[:threads])
        if ("limits", shape, threads, round_) not in done:
            (found,) = json.loads(output([limits, threads]))
            record(results, "limits", shape, threads, round_, found)
        for peer in PEERS:
            file = files.get((peer.name, shape))
            if file is None or (peer.name, shape, threads, round_) in done:
                continue
            try:
                speed = peer.measure(folder, file, Turn(threads))
            except RuntimeError as error:
                print(f"failed: {peer.name}, {shape}: {error}", flush=True)
                continue
            record(results, peer.name, shape, threads, round_, {**speed, "bytes": size(file)})
    os.sched_setaffinity(0, usable)


def record(
    results: Path, peer: str, shape: str, threads: int, round_: int, found: dict[str, Any]
) -> None:
    """Append a result, with the load of the machine and the commit."""
    row = {"peer": peer, "shape": shape, "threads": threads, "round": round_, **found}
    row |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "load": os.getloadavg()[0]}
    commit = output(["git", "-C", HERE.parent, "rev-parse", "--short", "HEAD"]).strip()
    row |= {"commit": commit, "cpu": cpu_name()}
    with results.open("a") as out:
        out.write(json.dumps(row) + "\n")
    figures = [f"{found[key]:8.0f}" for key in ("prefill", "decode") if key in found]
    print(f"{threads} {shape:10} {round_} {peer:22}", *figures, flush=True)


def cpu_name() -> str:
    """What the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("build/peers"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.folder.resolve(), arguments.rounds)
    else:
        write_report(arguments.folder / "results.jsonl", arguments.output)


if __name__ == "__main__":
    main()
