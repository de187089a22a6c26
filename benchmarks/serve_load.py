"""Many clients at once: does `squat serve` answer all of them, each what a single engine answers?

    python benchmarks/serve_load.py MODEL.gguf

First one engine answers every request by itself. Then a server is started, and clients send the same
requests, each the next one when it has its answer, in streams. Printed are requests that got no answer or
another one, how long the first token took from the moment of asking (waiting for the others included), and
the server's memory. Exit status 1 if an answer is missing or is another one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from squat import Engine

TOPICS = (
    "the sea",
    "bread",
    "winter",
    "trains",
    "birds",
    "music",
    "gardens",
    "the moon",
    "tea",
    "maps",
)


@dataclass(frozen=True)
class Outcome:
    """What came of a request: the text, or what went wrong, and the seconds until the first token."""

    text: str | None
    seconds: float
    problem: str = ""


def question(number: int) -> dict[str, Any]:
    """The request of a number: every one is another, and their answers differ."""
    text = f"Tell me something about {TOPICS[number % len(TOPICS)]}. My number is {number}."
    return {"messages": [{"role": "user", "content": text}], "temperature": 0.7, "seed": number}


@contextmanager
def server(model: Path, clients: int, parallel: int) -> Iterator[tuple[str, int]]:
    """The address and the process of a server that lets all clients wait."""
    command = [sys.executable, "-m", "squat", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-waiting", str(clients), "--parallel", str(parallel)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[0], process.pid
    finally:
        process.terminate()
        process.wait()


def ask(client: openai.OpenAI, model: str, number: int, tokens: int) -> Outcome:
    """One request and its stream."""
    began, first, text = time.monotonic(), 0.0, ""
    try:
        stream = client.chat.completions.create(
            model=model, stream=True, max_tokens=tokens, **question(number)
        )
        for chunk in stream:
            if piece := chunk.choices[0].delta.content:
                first = first or time.monotonic() - began
                text += piece
    except openai.OpenAIError as error:
        return Outcome(None, 0.0, str(error))
    return Outcome(text, first)


def memory(process: int) -> float:
    """What a process holds of the machine's memory, in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def run(model: Path, clients: int, requests: int, tokens: int, parallel: int) -> bool:
    """Measure and print; whether everybody got their answer."""
    engine = Engine(model)
    expected = [engine.chat(max_new_tokens=tokens, **question(n)) for n in range(requests)]
    print(
        f"{model.name}: {requests} requests by {clients} clients, {tokens} tokens each at most, "
        f"{parallel} together"
    )
    print(f"answers that differ from each other: {len(set(expected))} of {requests}")
    del engine

    done, lock = 0, threading.Lock()
    with server(model, clients, parallel) as (url, process):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)

        def one(number: int) -> Outcome:
            nonlocal done
            outcome = ask(client, model.stem, number, tokens)
            with lock:
                done += 1
                if done % max(requests // 10, 1) == 0:
                    held.append(memory(process))
            return outcome

        ask(client, model.stem, 0, tokens)  # so that everything is loaded
        held, began = [memory(process)], time.monotonic()
        with ThreadPoolExecutor(clients) as threads:
            outcomes = list(threads.map(one, range(requests)))
        seconds = time.monotonic() - began

    lost = [outcome.problem for outcome in outcomes if outcome.text is None]
    others = sum(o.text not in (None, text) for o, text in zip(outcomes, expected, strict=True))
    firsts = [outcome.seconds for outcome in outcomes if outcome.seconds]
    print(f"lost: {len(lost)}{': ' + lost[0] if lost else ''}")
    print(f"not what one engine says: {others}")
    print(f"requests a second: {requests / seconds:.2f}")
    if len(firsts) > 1:
        last = statistics.quantiles(firsts, n=20)[-1]
        print(
            f"first token, seconds: median {statistics.median(firsts):.2f}, 95th percentile {last:.2f}"
        )
    print(f"the server's memory, MB: {' '.join(f'{size:.0f}' for size in held)}")
    return not lost and not others


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=4, help="answers computed together")
    options = parser.parse_args()
    sys.exit(0 if run(**vars(options)) else 1)


if __name__ == "__main__":
    main()
