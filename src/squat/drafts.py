"""Guesses at the next tokens from the text itself: what followed the last time that it went like this.

Summaries, corrections, code and answers about a text repeat much of what they have read. Guesses are computed
along with the next token, in one pass over the weights, and kept as far as they are what is chosen then
("prompt lookup"; speculative decoding is arXiv 2211.17192). A wrong guess costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (4, 3, 2)
"""Tokens that have to be the same for a guess; the most are looked for first."""
_MORE = 2
"""Guesses beyond as many as were right the last time."""


class Drafts:
    """Guesses behind a text.

    Args:
        tokens: of the text.
        most: guesses at a time.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most, self._next = most, _MORE
        self._tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on."""
        for length in _LENGTHS:
            if length <= len(self._tokens):
                self._following[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """What may come next, no more than there is room for."""
        for length in _LENGTHS:
            at = self._following.get(tuple(self._tokens[-length:]))
            if at is not None:
                return self._tokens[at : at + min(self._next, self._most, room)]
        return []

    def learn(self, right: int) -> None:
        """So many of the last guesses, from the first one on, were right."""
        self._next = right + _MORE
