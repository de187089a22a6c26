"""How much of a model is left: quantized models beside their original, on running text.

    python benchmarks/real_model.py compare ORIGINAL MODEL ... --data FILE [--out FILE.json]
    python benchmarks/real_model.py llama-cpp ORIGINAL.gguf OUT.gguf Q4_0|Q4_K_M|...
    python benchmarks/real_model.py prepare openvino-4|onnxruntime-4|... ORIGINAL OUT
    python benchmarks/real_model.py speed FILE.gguf ... llama.cpp:FILE.gguf [--threads 1] [--prompt 128]

`compare` tokenizes a text as it stands, cuts it into windows of 256 tokens, puts the model's first token
before each, and measures on every predicted token: loss, KL(original || model), and how often the most
probable token is the same. A model is a folder, a .gguf file of Squat (which runs in the engine), one of
another program (whose weights are read, and computed with in float), or llama.cpp:FILE.gguf, which runs there
(`make llama-cpp` builds it).

`llama-cpp` lets llama.cpp quantize a .gguf file, with every tensor of one kind, as --pure does, where it has
one.

`prepare` makes OpenVINO's or ONNX Runtime's model of a folder.

`speed` measures a prefill and decoding behind it. Every model has its turn in every round, in a process of
its own, bound to as many CPUs as it has threads; ratios are medians of those within a round, to the last one.
Beside Squat's files there are llama.cpp:FILE.gguf, llama.cpp-q8_0:FILE.gguf (the type of keys and values),
openvino-4:FOLDER and onnxruntime-4:FOLDER. What they need is installed into build/peers when it is first
needed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import build_llama_cpp
import numpy as np
import peers
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from squat.checkpoints import load_model, load_tokenizer
from squat.data.files import writing
from squat.engine import Engine
from squat.exact import approximately
from squat.model_names import runs_in_engine

WINDOW = 256
PEERS = Path("build/peers").resolve()
THERE = "llama.cpp:"
"""In front of a file that runs in llama.cpp."""
Logits = Callable[[list[int]], NDArray[np.float32] | torch.Tensor]


@dataclass
class Kept:
    """What a model has kept of its original; nats a token, and shares from 0 to 1."""

    model: str
    megabytes: float
    loss: float = 0.0
    above: float = 0.0
    kl: float = 0.0
    same: float = 0.0
    tokens: int = 0


def size_of(name: str) -> float:
    path = Path(name.removeprefix(THERE))
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) / 1e6


def logits_of(name: str) -> Logits:
    """A function from token ids to the logits after each of them: [tokens, vocabulary]."""
    if name.startswith(THERE):
        return llama_cpp_logits(name.removeprefix(THERE))
    if runs_in_engine(name):
        return Engine(name, threads=torch.get_num_threads()).logits
    model = load_model(name)

    @torch.no_grad()
    def of_folder(ids: list[int]) -> torch.Tensor:
        with approximately():
            return model(torch.tensor([ids]), use_cache=False).logits[0]

    return of_folder


def llama_cpp_logits(file: str) -> Logits:
    import llama_cpp

    model = llama_cpp.Llama(
        file,
        n_ctx=WINDOW + 1,
        logits_all=True,
        verbose=False,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
    )

    def of_llama(ids: list[int]) -> NDArray[np.float32]:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)])

    return of_llama


def windows_of(original: str, data: Path, limit: int | None) -> list[list[int]]:
    tokenizer = load_tokenizer(original)
    ids = tokenizer(data.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    whole = range(0, len(ids) - WINDOW + 1, WINDOW)
    return [[first, *ids[begin : begin + WINDOW]] for begin in whole][:limit]


def compare(arguments: argparse.Namespace) -> None:
    names = [arguments.original, *arguments.models]
    models = [logits_of(name) for name in names]
    rows = [Kept(name, size_of(name)) for name in names]
    windows = windows_of(arguments.original, arguments.data, arguments.windows)
    for window in track(
        windows, "windows", console=Console(stderr=True), disable=not sys.stderr.isatty()
    ):
        following = torch.tensor(window[1:])
        expected = None
        for model, row in zip(models, rows, strict=True):
            got = torch.as_tensor(model(window))[:-1].float().log_softmax(-1)
            expected = got if expected is None else expected
            row.loss -= float(got.gather(1, following[:, None]).sum())
            row.kl += float((expected.exp() * (expected - got)).sum())
            row.same += float((expected.argmax(1) == got.argmax(1)).sum())
            row.tokens += len(following)
    for row in rows:
        row.loss, row.kl, row.same = (v / row.tokens for v in (row.loss, row.kl, row.same))
        row.above = row.loss - rows[0].loss
    table = Table(title=f"{rows[0].tokens:,} tokens of {arguments.data.name}")
    for heading in ("model", "MB", "loss", "above", "KL", "same top token"):
        table.add_column(
            heading, justify="left" if heading == "model" else "right", overflow="fold"
        )
    for row in rows:
        numbers = (f"{row.megabytes:.1f}", f"{row.loss:.4f}", f"{row.above:+.4f}", f"{row.kl:.4f}")
        table.add_row(row.model, *numbers, f"{100 * row.same:.1f} %")
    Console().print(table)
    if arguments.out is not None:
        with writing(arguments.out) as out:
            out.write(json.dumps([asdict(row) for row in rows], indent=1).encode())


def llama_cpp(arguments: argparse.Namespace) -> None:
    import llama_cpp as library

    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{arguments.kind}")
    parameters.allow_requantize = True
    parameters.pure = "_K_" not in arguments.kind
    source, out = (str(path).encode() for path in (arguments.original, arguments.out))
    if library.llama_model_quantize(source, out, parameters) != 0:
        sys.exit(f"{arguments.out}: llama.cpp could not write it")


def prepare(arguments: argparse.Namespace) -> None:
    worker = [peers.interpreter(PEERS), peers.HERE / "peer_worker.py"]
    paths = [path.resolve() for path in (arguments.original, arguments.out)]
    peers.output([*worker, "prepare", arguments.kind, *paths])


def peer_of(name: str) -> tuple[peers.Peer, Path]:
    """Who runs a model, and its file."""
    kind, colon, file = name.partition(":")
    if not colon:
        return peers.squat("", "8"), Path(name)
    program, _, of_it = kind.partition("-")
    if program == "llama.cpp":
        build_llama_cpp.build(PEERS, "llama-bench")
        return peers.llama("", of_it or "f16"), Path(file)
    return peers.python(name, kind), Path(file)


def speed(arguments: argparse.Namespace) -> None:
    turn = peers.Turn(arguments.threads, arguments.prompt, arguments.generate, arguments.repeats)
    runners = {name: peer_of(name) for name in arguments.models}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: turn.threads])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for _ in track(range(arguments.rounds), "rounds", console=Console(stderr=True)):
        for name, (peer, file) in runners.items():
            found[name].append(peer.measure(PEERS, file, turn))
    last = found[arguments.models[-1]]
    table = Table(
        title=f"{turn.prompt} + {turn.generate}, {turn.threads} threads, {peers.cpu_name()}"
    )
    for heading in ("model", "prefill, tokens/s", "ratio", "decode, tokens/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, turns in found.items():
        cells = [name]
        for phase in ("prefill", "decode"):
            ratios = [a[phase] / b[phase] for a, b in zip(turns, last, strict=True)]
            cells.append(f"{statistics.median(turn[phase] for turn in turns):,.0f}")
            cells.append(f"{statistics.median(ratios):.2f}")
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compare", help="quantized models beside their original")
    one.add_argument("original")
    one.add_argument("models", nargs="+")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--windows", type=int, help="how many; default: the whole text")
    one.add_argument("--out", type=Path)
    one.set_defaults(run=compare)
    other = commands.add_parser("llama-cpp", help="let llama.cpp quantize a .gguf file")
    other.add_argument("original", type=Path)
    other.add_argument("out", type=Path)
    other.add_argument("kind")
    other.set_defaults(run=llama_cpp)
    made = commands.add_parser("prepare", help="make another engine's model of a folder")
    made.add_argument("kind", help="openvino-4, onnxruntime-4, ...")
    made.add_argument("original", type=Path)
    made.add_argument("out", type=Path)
    made.set_defaults(run=prepare)
    third = commands.add_parser("speed", help="files beside each other, and beside llama.cpp")
    third.add_argument("models", nargs="+", metavar="model")
    third.add_argument("--threads", type=int, default=1)
    third.add_argument("--rounds", type=int, default=7)
    third.add_argument("--prompt", type=int, default=128)
    third.add_argument("--generate", type=int, default=128)
    third.add_argument("--repeats", type=int, default=3, help="of a turn, whose median counts")
    third.set_defaults(run=speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
