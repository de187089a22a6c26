"""Several sessions in one pass: how many tokens a second do they decode together, over one alone?

    python benchmarks/batch.py MODEL.gguf

Each session has its own text of `--context` tokens, and gets one more with every pass. The sizes take turns,
round by round; printed are medians of all rounds, and the ratio to one session in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from squat import Engine

PASSES = 16
"""Of each size in each round."""


def sessions_of(engine: Engine, size: int, context: int, rng: np.random.Generator) -> list[Engine]:
    """So many sessions, each with a text of its own."""
    sessions = [engine.share(1, context + PASSES) for _ in range(size)]
    for session in sessions:
        session.prefill(rng.integers(0, engine.info.vocab_size, context))
    return sessions


def tokens_a_second(engine: Engine, sessions: list[Engine], context: int) -> float:
    """Of all sessions together, from the same context every time."""
    for session in sessions:
        session.rewind(context)
    began = time.perf_counter()
    for token in range(PASSES):
        engine._step([(session, [token + 10]) for session in sessions])
    return len(sessions) * PASSES / (time.perf_counter() - began)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    engine = Engine(options.model, threads=options.threads, context=options.context + PASSES)
    groups = [sessions_of(engine, size, options.context, rng) for size in options.sizes]
    rounds = [
        [tokens_a_second(engine, group, options.context) for group in groups]
        for _ in range(options.rounds)
    ]
    print(
        f"{options.model.name}, {engine.info.isa}, {options.threads} threads, context {options.context}"
    )
    for index, size in enumerate(options.sizes):
        speed = statistics.median(row[index] for row in rounds)
        ratio = statistics.median(row[index] / row[0] for row in rounds)
        print(f"{size:3d} sessions: {speed:7.1f} tokens/s together, {ratio:.2f}x")


if __name__ == "__main__":
    main()
