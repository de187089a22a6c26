"""Who is next: clients wait in the order of their arrival, no more of them than there are places."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from itertools import islice

_LOOK = 0.25
"""Seconds between two looks at whether a waiting client is still there."""


class FullError(Exception):
    """Everybody has to wait, and all places are taken."""


class GoneError(Exception):
    """The client has hung up."""


class Line:
    """The first `served` in it have the engine, together; up to `limit` more wait."""

    def __init__(self, served: int, limit: int) -> None:
        self._served, self._limit = served, limit
        self._places: deque[Place] = deque()

    def __len__(self) -> int:
        return len(self._places)

    def join(self) -> Place:
        """A place at the end, which has to be left in any case.

        Raises:
            FullError: there is none.
        """
        if len(self._places) >= self._served + self._limit:
            raise FullError
        place = Place(self)
        self._places.append(place)
        self.move()
        return place

    def leave(self, place: Place) -> None:
        """Whoever is next moves up; a place that was left before stays so."""
        if place in self._places:
            self._places.remove(place)
            self.move()

    def move(self) -> None:
        """Tell the first ones."""
        for place in islice(self._places, self._served):
            place.served.set()


class Place:
    """A client's place in a line."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._stack = ExitStack()
        self.served = asyncio.Event()

    async def reach(self, gone: Callable[[], Awaitable[bool]]) -> None:
        """Wait until enough of those before have left.

        Raises:
            GoneError: the client did not wait as long.
        """
        while not self.served.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.served.wait(), _LOOK)
            if await gone():
                raise GoneError

    def on_leaving(self, function: Callable[[], None]) -> None:
        """What is to be done before the next one moves up."""
        self._stack.callback(function)

    def leave(self) -> None:
        """Let the next one have the engine."""
        self._stack.close()
        self._line.leave(self)
