"""What it costs to hold an answer to a form: time a token, beside the same model's answers without one.

    python benchmarks/forms.py MODEL.gguf [--rounds 20]

One thread. Each round answers once under a schema, then writes as many tokens freely; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import jsonschema
from rich.table import Table

from squat import Engine
from squat.forms import json_schema
from squat.terminal import show

PROMPT = "Write down a person, as JSON: "
SCHEMAS: dict[str, dict[str, Any]] = {
    "a person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "a list of choices": {
        "type": "array",
        "items": {"enum": ["red", "green", "blue", "yellow"]},
        "minItems": 8,
        "maxItems": 8,
    },
    "a long string": {"type": "string", "minLength": 100, "maxLength": 160},
}


def seconds_a_token(answer: Any) -> tuple[float, int, str]:
    """Of an answer that is written now: seconds a token behind the first, tokens, and its text."""
    pieces = [next(answer)]  # the prompt is read before the first
    begin = time.perf_counter()
    pieces += answer
    tokens = answer.new_tokens - 1
    return (time.perf_counter() - begin) / max(tokens, 1), tokens, "".join(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a .gguf file of ours")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    engine = Engine(args.model, threads=1)
    table = Table("form", "tokens", "freely, ms a token", "held to it, ms a token", "more")
    for name, schema in SCHEMAS.items():
        form = json_schema(schema)
        free, held, counts = [], [], []
        for seed in range(args.rounds):
            options = {"temperature": 1.0, "seed": seed, "stream": True}
            answer = engine.generate(PROMPT, 200, form=form, **options)
            seconds, tokens, text = seconds_a_token(answer)
            if answer.finish_reason == "stop":
                jsonschema.validate(json.loads(text), schema)
            held.append(seconds)
            counts.append(tokens)
            free.append(seconds_a_token(engine.generate(PROMPT, tokens + 1, **options))[0])
        plain, formed = statistics.median(free) * 1e3, statistics.median(held) * 1e3
        more = f"{formed - plain:.2f} ms, {formed / plain - 1:.0%}"
        table.add_row(
            name, f"{statistics.median(counts):.0f}", f"{plain:.2f}", f"{formed:.2f}", more
        )
    show(table)


if __name__ == "__main__":
    main()
