"""From a file to an open port: `squat serve` runs until somebody ends it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from squat.engine import Engine
from squat.errors import ServingError
from squat.serving.app import Limits, Service

_END_SECONDS = 5
"""How long connections may stay open after Ctrl-C."""
_HEAD_SECONDS = 30.0
"""How long a client may take to say what it wants."""
_CONNECTIONS = 256
"""Open at once."""


def serve(model: str, host: str, port: int, api_key: str | None, limits: Limits) -> None:
    """Answer requests until the process is told to end.

    Args:
        model: a .gguf file, whose name without the ending is the model's.
        host: an address or name of this machine.
        port: 0: one that is free.
        api_key: what clients have to show, if anything.
        limits: what they may ask for.

    Raises:
        SquatError: the file cannot be loaded, the key is empty, or the address is not free.
    """
    if api_key == "":
        raise ServingError("--api-key: is empty and would let everybody in; give one, or no option")
    with listen(host, port) as listener:
        service = service_of(model, api_key, limits)
        name, taken = listener.getsockname()[:2]
        place = f"[{name}]" if ":" in name else name
        print(
            f"http://{place}:{taken}/v1 answers as {Path(model).stem}; Ctrl-C ends it", flush=True
        )
        Server(service).run(sockets=[listener])


class Connection(H11Protocol):
    """One that nobody keeps open without asking for anything: there are only so many.

    Beyond that, a new one takes the place of the one that has been silent for longest.
    """

    _since = 0.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._expect()
        every = [c for c in self.connections if isinstance(c, Connection)]
        held = [c for c in every if not c.transport.is_closing()]
        if len(held) > _CONNECTIONS:
            silent = (connection for connection in held if connection._silent)
            min(silent, key=lambda connection: connection._since).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """It has its answer, and may ask again."""
        super().on_response_complete()
        self._expect()

    @property
    def _silent(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._since = self.loop.time()
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self._silent:
            self.transport.close()


class Server(uvicorn.Server):
    """Told to end, it does not wait for long answers."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            service.app(),
            http=Connection,
            log_level="warning",
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What Ctrl-C does."""
        self._service.close()
        super().handle_exit(sig, frame)


def service_of(model: str, api_key: str | None, limits: Limits) -> Service:
    """The service of a model's file; raises like `Engine`."""
    engine = Engine(model)
    file = Path(model)
    return Service(engine, file.stem, int(file.stat().st_mtime), api_key, limits)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything that takes time.

    Raises:
        ServingError: it is not free, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (socket.gaierror, UnicodeError):
        cause = "no such address"
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
    raise ServingError(
        f"{host}:{port}: cannot listen there ({cause}); name another place with --host and --port"
    )
