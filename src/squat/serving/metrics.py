"""What a server has done so far, in Prometheus's text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from squat.engine import Generation


class Metrics:
    """Counts that only grow."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._answers = 0
        self._seconds = 0.0

    def count_request(self, path: str, status: int) -> None:
        """A request has got an answer, or the beginning of one."""
        self._requests[path, status] += 1

    def count_answer(self, generation: Generation) -> None:
        """The engine has worked on an answer, perhaps on one that nobody waits for any more."""
        self._tokens["reused"] += generation.reused_tokens
        self._tokens["generated"] += generation.new_tokens
        self.count_prompt(generation.prompt_tokens)

    def count_prompt(self, tokens: int) -> None:
        """The engine has worked on an answer that took so many tokens."""
        self._tokens["prompt"] += tokens
        self._answers += 1

    def count_work(self, seconds: float) -> None:
        """The engine has worked for so long, on however many answers."""
        self._seconds += seconds

    @property
    def seconds_an_answer(self) -> float:
        """Of the engine's time, on average; 0 before the first one."""
        return self._seconds / max(self._answers, 1)

    def text(self, in_line: int) -> str:
        """All of it, with the number of clients in line, those being served among them."""
        requests = {
            f'{{path="{path}",status="{status}"}}': count
            for (path, status), count in sorted(self._requests.items())
        }
        tokens = {f'{{kind="{kind}"}}': count for kind, count in sorted(self._tokens.items())}
        return "".join(
            (
                _family("requests_total", "counter", "Requests by path and status.", requests),
                _family("tokens_total", "counter", "Tokens of prompts, of these not computed "
                        "again, and generated.", tokens),
                _family("answers_total", "counter", "Answers computed.", {"": self._answers}),
                _family("busy_seconds_total", "counter", "Time the engine has worked.",
                        {"": self._seconds}),
                _family("clients", "gauge", "Clients served or waiting.", {"": in_line}),
            )
        )  # fmt: skip


def _family(name: str, kind: str, meaning: str, values: Mapping[str, float]) -> str:
    lines = [f"# HELP squat_{name} {meaning}", f"# TYPE squat_{name} {kind}"]
    lines += [f"squat_{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"
