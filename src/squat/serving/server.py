"""From a file to an open port: `squat serve` runs until somebody ends it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import FrameType

import uvicorn

from squat.engine import Engine
from squat.errors import ServingError
from squat.serving.app import Limits, Service

_END_SECONDS = 5
"""How long connections may stay open after Ctrl-C."""


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
        config = uvicorn.Config(
            service.app(),
            log_level="warning",
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        name, taken = listener.getsockname()[:2]
        place = f"[{name}]" if ":" in name else name
        print(
            f"http://{place}:{taken}/v1 answers as {Path(model).stem}; Ctrl-C ends it", flush=True
        )
        _Server(config, service).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Told to end, it does not wait for long answers."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
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
