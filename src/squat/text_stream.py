"""Text as it becomes known, token by token: no character is cut in two, and no stop string is shown.

Both hold something back: bytes that may go on to be a character, and characters that may go on to be a stop
string. Joined, the pieces are what the whole text would have given at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np

from squat import _native
from squat.errors import EngineError


class TextStream:
    """Text of tokens as they come, never cutting a character in two: together, the text of all of them.

    A character may need several tokens; what is no UTF-8 becomes U+FFFD.
    """

    def __init__(self, engine: _native.Engine, prompt: list[int]) -> None:
        self._engine = engine
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The prompt may end inside of a character.
        self._decoder.decode(engine.detokenize(np.array(prompt, np.int32)))
        self._begins = not any(map(engine.piece, prompt))  # a text, which may lose a space

    def push(self, token: int) -> str:
        """The new text after one more token; "" while a character is incomplete."""
        piece = self._engine.piece(token)
        if piece and self._begins:
            piece = self._engine.detokenize(np.array([token], np.int32))
            self._begins = False
        return self._decoder.decode(piece)

    def rest(self) -> str:
        """What has not been returned: U+FFFD if a character has no end."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Ends a text where the first of some strings is complete, and leaves that string out.

    However the text is cut into pieces, the result is the same: of the strings that are complete first, the
    longest is taken off.

    Raises:
        EngineError: an empty one, which would end every text.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise EngineError("stop: is one string; give a list of strings")
        if "" in stop:
            raise EngineError("stop: a string is empty and would end every text; leave it out")
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What can be shown after one more piece of the text; nothing follows once one is `found`."""
        text = self._held + piece
        ends = [
            (begin + len(stop), begin) for stop in self._stop if (begin := text.find(stop)) >= 0
        ]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        shown = len(text) - self._open(text)
        self._held = text[shown:]
        return text[:shown]

    def rest(self) -> str:
        """What was held back, once the text is known to go no further."""
        rest, self._held = self._held, ""
        return rest

    def _open(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
