"""Several answers at once: sessions of one model, whose next tokens are computed in one pass.

Decoding reads all weights for each token. A pass for several sessions reads them once, and so costs little
more than one for a single session does. Each answer is the one that it would be alone, bit for bit.

An answer joins at any time, with its prompt, and leaves when it is complete (continuous batching).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from squat.engine import Engine, Generation, GenerationOptions
from squat.errors import EngineError, SquatError

_PASS = 128
"""Tokens of a pass, prompts among them: so long does nobody wait for the next token of an answer."""


class Batch:
    """Sessions that an engine computes together.

    Args:
        engine: whose threads compute. Its own session is not touched; nothing else may use the engine
            meanwhile.
        size: how many.
        context: the most tokens of each; 0: as many as the engine's session holds, which is the most.

    Raises:
        EngineError: an argument out of range, or no memory.
    """

    def __init__(self, engine: Engine, size: int, context: int = 0) -> None:
        if size < 1:
            raise EngineError(f"size: {size} is below 1")
        most = engine.info.context
        if context > most:
            raise EngineError(f"context: {context} is more than the engine's {most}")
        self._engine = engine
        # The one that was not used for longest comes first.
        self._free = [engine.share(1, context or most) for _ in range(size)]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int | None = 64,
        **options: Unpack[GenerationOptions],
    ) -> list[str]:
        """Continue texts: a list of what `Engine.generate` gives for each.

        Args:
            prompts: as many as one likes; those beyond the batch's size wait for a place.
            max_new_tokens: the most tokens of each; None: as many as the context has room for.
            **options: like `Engine.generate`; nothing is guessed, whatever `speculate` says.

        Raises:
            EngineError: like `Engine.generate`, before anything is computed; it names the prompt.
        """
        texts = [""] * len(prompts)
        for index, piece in self.stream(prompts, max_new_tokens, **options):
            texts[index] += piece
        return texts

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int | None = 64,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[tuple[int, str]]:
        """Like `generate`, but pieces of text as soon as they are known, each with its prompt's index.

        Raises:
            EngineError: like `generate`.
        """
        if isinstance(prompts, str):
            raise EngineError("prompts: is one string; give a list of strings")
        waiting = deque[Generation]()
        for index, prompt in enumerate(prompts):
            try:
                waiting.append(
                    self._engine.generate(prompt, max_new_tokens, stream=True, **options)
                )
            except EngineError as error:
                raise EngineError(f"prompts: element {index}: {error}") from None
        # Each is forgotten when it is over, and what its sampler works with.
        return self.run(waiting.popleft() for _ in prompts)

    def run(self, answers: Iterable[Generation]) -> Iterator[tuple[int, str]]:
        """Pieces of the text of answers that `Engine.generate` has prepared, each with its answer's index.

        An answer is asked for when there is a session for it, and has its `finish_reason` with its last
        piece, which may be empty.
        """
        waiting, parts = enumerate(answers), dict[int, Part]()
        try:
            while True:
                for index, answer in islice(waiting, len(self._free)):
                    parts[index] = self.join(answer)
                if not parts:
                    return
                for index, piece in zip(list(parts), self.step(list(parts.values())), strict=True):
                    if piece or parts[index].complete:
                        yield index, piece
                for index in [i for i, part in parts.items() if part.complete]:
                    part = parts.pop(index)
                    self.leave(part)
                    if part.error is not None:
                        raise part.error
        finally:
            for part in parts.values():
                self.leave(part)

    def join(self, answer: Generation) -> Part:
        """Begin an answer in a free session, which has to leave in any case.

        It is the session that holds most of its prompt, if that is more than half of what it holds; otherwise
        the one that was not used for longest.

        Raises:
            EngineError: there is none.
        """
        if not self._free:
            raise EngineError("batch: all sessions are taken")
        shared = [engine.shared_tokens(answer.prompt) for engine in self._free]
        best = max(range(len(shared)), key=shared.__getitem__)
        # Another conversation's beginning is no reason to take it away from that one.
        fits = 2 * shared[best] > len(self._free[best].tokens)
        return Part(self._free.pop(best if fits else 0), answer)

    def leave(self, part: Part) -> None:
        """Let the next one have an answer's session."""
        self._free.append(part.engine)

    def step(self, parts: Sequence[Part]) -> list[str]:
        """One pass for answers that are not complete: the next token, or more of the prompt is read.

        Returns what is new of the text of each.
        """
        left = max(_PASS - len(parts), 0)
        turns = []
        for part in parts:
            some = part.ahead[: 1 + left]
            left -= len(some) - 1
            turns.append((part.engine, some))
        logits = self._engine._step(turns)
        return [
            part.read(len(some), row)
            for part, (_, some), row in zip(parts, turns, logits, strict=True)
        ]


class Part:
    """An answer's part in a batch.

    Attributes:
        engine: whose session it has.
        ahead: the tokens that it takes to go on; none where it is complete.
        error: what has ended it before that, such as a form that cannot be held to any further.
    """

    def __init__(self, engine: Engine, answer: Generation) -> None:
        self.engine = engine
        self.error: SquatError | None = None
        self._work = answer.work(engine)
        _, self.ahead = next(self._work)

    @property
    def complete(self) -> bool:
        """Whether there is no more text."""
        return not self.ahead

    def read(self, count: int, logits: NDArray[np.float32]) -> str:
        """Go on: so many tokens have been computed, the last one with these logits [vocabulary]."""
        self.ahead = self.ahead[count:]
        if self.ahead:
            return ""
        try:
            piece, self.ahead = self._work.send(logits[None])
        except SquatError as error:
            self.error = error
            return ""
        return piece
