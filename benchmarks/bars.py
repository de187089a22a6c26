"""What the engine promises beside speed: loading, memory, size, and evaluation faster than PyTorch's.

    python benchmarks/bars.py engine                            load time, resident memory, library size
    python benchmarks/bars.py blimp CHECKPOINT FILE.gguf BLIMP [--limit 100]

`engine` loads a LLaMA-58M of random weights, each time in a process of its own, and builds the library.
`blimp` scores the same minimal pairs with a quantized checkpoint in PyTorch and with its file in the engine,
one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from squat.bench import write_random_file

ROOT = Path(__file__).parent.parent
LOAD = """
import resource, sys, time
from squat import _native
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, start = resident(), time.perf_counter()
engine = _native.Engine(sys.argv[1], 1, 256)
loaded = time.perf_counter() - start
import numpy as np
engine.eval(np.arange(128, dtype=np.int32))
print(loaded * 1e3, resident() - before)
"""


def engine() -> None:
    """Median of ten loads of a file that is in the page cache; memory after a prompt of 128 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.gguf"
        write_random_file(file, "llama-58m")
        runs = []
        for _ in range(11):
            out = subprocess.check_output([sys.executable, "-c", LOAD, file], text=True)
            runs.append([float(value) for value in out.split()])
        milliseconds, resident = (
            statistics.median(column) for column in zip(*runs[1:], strict=True)
        )
        size = file.stat().st_size
        print(f"load: {milliseconds:.1f} ms (bar: 50)")
        print(
            f"resident after a prompt: {resident / 1e6:.1f} MB of a file of {size / 1e6:.1f} MB: "
            f"{resident / size:.2f}x (bar: 1.3)"
        )
        build = Path(folder) / "build"
        configure = ["cmake", "-S", ROOT, "-B", build, "-DSQUAT_TESTS=OFF"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        command = ["cmake", "--build", build, "--target", "squat-run", "-j", "2"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["strip", build / "squat-run"], check=True)
        program = (build / "squat-run").stat().st_size
        print(f"squat-run, the whole engine, stripped: {program / 1e6:.2f} MB (bar: 1)")


def blimp(checkpoint: str, file: str, data: Path, limit: int | None) -> None:
    """The averages of both, and how long each took, loading included."""
    limits = [] if limit is None else ["--limit", str(limit)]
    for model in (checkpoint, file):
        program = "from squat.cli import main; main()"
        command = [sys.executable, "-c", program, "eval", model, "--task", "blimp"]
        command += ["--data", str(data), *limits, "--json", "-"]
        one = os.environ | {"OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        result = json.loads(subprocess.check_output(command, env=one, text=True))
        seconds = time.perf_counter() - start
        print(f"{model}: {100 * result['average_paradigms']:.2f} % in {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("engine")
    pairs = commands.add_parser("blimp")
    pairs.add_argument("checkpoint")
    pairs.add_argument("file")
    pairs.add_argument("data", type=Path)
    pairs.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    if arguments.what == "engine":
        engine()
    else:
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[:1])  # the engine starts a thread for each CPU it may use
        blimp(arguments.checkpoint, arguments.file, arguments.data, arguments.limit)


if __name__ == "__main__":
    main()
