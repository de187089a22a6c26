"""What an evaluation asks of a model: the log-probability of texts, or the logits of token ids.

Both are protocols: a class has them by having the method. `HuggingFaceScorer` and the engine are
`Scorer`s; the engine is a `LogitsModel` too. This module needs neither torch nor transformers.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from numpy.typing import ArrayLike


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
