"""What an evaluation asks of a model: the log-probability of texts, or the logits of token ids.

Both are protocols: a class has them by having the method. `HuggingFaceScorer` and the engine are
`Scorer`s; the engine is a `LogitsModel` too. This module needs neither torch nor transformers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


class Scorer(Protocol):
    """Anything that can say how probable a text is."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """Summed log-probability of each text, in nats, in the order given.

        The begin-of-text token is the only context; every token of the text is predicted.
        """
        ...


@runtime_checkable
class LogitsModel(Protocol):
    """Anything that maps one sequence of token ids to its next-token logits."""

    def logits(self, ids: Sequence[int]) -> ArrayLike:
        """Logits [len(ids), vocabulary]; row t is the prediction of the token after ids[t]."""
        ...


@contextmanager
def progress(steps: Sequence[Item], description: str) -> Iterator[Iterator[Item]]:
    """Iterate over `steps` with a bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield iter(bar.track(steps, description=description))
