"""The passes of the engine, one after the other: each computes the next tokens of all answers in progress.

A client that is slow to read, or gone, holds up nobody: what its answer says waits for it in a queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from squat.batch import Part
from squat.engine import Engine, Generation

_Result = TypeVar("_Result")


class Passes:
    """An engine and its sessions; all methods are for one event loop.

    Args:
        engine: used by nobody else.
        size: answers that are computed together. No more may have joined and not left.
        count: is told the seconds of each pass.
    """

    def __init__(self, engine: Engine, size: int, count: Callable[[float], None]) -> None:
        self._engine, self._batch, self._count = engine, engine.batch(size), count
        self._queues: dict[Part, asyncio.Queue[str | Exception | None]] = {}
        self._leaving: list[Part] = []
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def join(self, answer: Generation) -> Part:
        """A session for an answer, which has to leave in any case."""
        async with self._turn():
            return self._batch.join(answer)

    def leave(self, part: Part) -> None:
        """The session is for others, as soon as no pass is on its way."""
        self._leaving.append(part)
        if not self._lock.locked():
            self._give_back()

    async def pieces(self, part: Part) -> AsyncGenerator[str, None]:
        """What is new of an answer's text with each pass, until it is complete.

        Raises:
            SquatError: what has ended the answer.
        """
        queue = self._queues[part] = asyncio.Queue()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            while (piece := await queue.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self._queues.pop(part, None)

    async def alone(self, function: Callable[[Engine], _Result]) -> _Result:
        """Something that the engine does between two passes."""
        async with self._turn():
            return await self._timed(lambda: function(self._engine))

    async def _run(self) -> None:
        try:
            while self._queues:
                async with self._turn():
                    await self._pass()
        finally:
            self._task = None

    async def _pass(self) -> None:
        parts = list(self._queues)
        pieces: Sequence[str | Exception]
        try:
            pieces = await self._timed(lambda: self._batch.step(parts))
        except Exception as error:  # it is everybody's
            pieces = [error] * len(parts)
        for part, piece in zip(parts, pieces, strict=True):
            if (queue := self._queues.get(part)) is None:
                continue
            queue.put_nowait(piece)
            if part.complete:
                queue.put_nowait(part.error)
            if part.complete or isinstance(piece, Exception):
                del self._queues[part]

    async def _timed(self, function: Callable[[], _Result]) -> _Result:
        began = time.monotonic()
        try:
            return await run_in_threadpool(function)
        finally:
            self._count(time.monotonic() - began)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """The engine, and all sessions that are free after that."""
        async with self._lock:
            try:
                yield
            finally:
                self._give_back()

    def _give_back(self) -> None:
        while self._leaving:
            self._batch.leave(self._leaving.pop())
