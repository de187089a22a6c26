"""Guesses from the text itself: how much sooner is an answer there?

    python benchmarks/speculate.py MODEL.gguf --data TEXT

Paragraphs of a text (`--data`, a file with one a line) are given to a model that chats, with different tasks;
every answer is computed without guesses and with them, in turns, and has to be the same. Printed are medians
of the ratio of the times that decoding took, and how many of the tokens had been guessed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

from squat import Engine

TASKS = {
    "repeat": "Repeat this text word by word:\n\n{}",
    "correct": "Correct the spelling of this text, and change nothing else:\n\n{}",
    "summarize": "Summarize this text in two sentences:\n\n{}",
    "question": "{}\n\nWhat is this about? Quote the text.",
    "story": "Tell a short story that begins like this: {}",
}


def timed(engine: Engine, prompt: str, tokens: int, speculate: int) -> tuple[str, float, float]:
    """The answer, seconds of decoding, and the share of its tokens that had been guessed."""
    messages = [{"role": "user", "content": prompt}]
    engine.rewind(0)
    answer = engine.chat(messages, tokens, stream=True, speculate=speculate)
    steps, text, began = answer.steps, "", 0.0
    for piece in steps:
        began = began or time.perf_counter()  # the prompt has been read
        text += piece
    seconds = time.perf_counter() - began
    return text, seconds, answer.accepted_tokens / max(answer.decoded_tokens, 1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--paragraphs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--guesses", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    engine = Engine(options.model, threads=options.threads)
    with options.data.open() as lines:
        long = (line.strip() for line in lines if 300 < len(line) < 900)
        paragraphs = list(islice(long, options.paragraphs))
    print(
        f"{options.model.name}, {engine.info.isa}, {options.threads} threads, {options.tokens} tokens"
    )
    for task, form in TASKS.items():
        ratios: dict[int, list[float]] = {count: [] for count in options.guesses}
        shares: dict[int, list[float]] = {count: [] for count in options.guesses}
        for paragraph in paragraphs:
            prompt = form.format(paragraph)
            for count in options.guesses:
                expected, plain, _ = timed(engine, prompt, options.tokens, 0)
                text, seconds, share = timed(engine, prompt, options.tokens, count)
                if text != expected:
                    raise SystemExit(f"{task}: another answer with {count} guesses")
                ratios[count].append(plain / seconds)
                shares[count].append(share)
        row = (
            f"{count:3d}: {statistics.median(ratios[count]):.2f}x "
            f"({statistics.mean(shares[count]):.0%} guessed)"
            for count in options.guesses
        )
        print(f"{task:10s} " + "   ".join(row), flush=True)


if __name__ == "__main__":
    main()
