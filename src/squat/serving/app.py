"""The routes: a request is checked, gets a place in line, and then its answer, whole or in a stream.

Whatever can be wrong with a request is found before its stream begins, and so its status says it.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from squat.engine import Engine, Generation
from squat.errors import FormError, SquatError, ToolsError
from squat.serving import page
from squat.serving.answers import DONE, Answer, RequestError, event
from squat.serving.embeddings import EmbeddingBody, embedding_list
from squat.serving.line import FullError, GoneError, Line, Place
from squat.serving.metrics import Metrics
from squat.serving.passes import Passes
from squat.serving.requests import AnyBody, Body, ChatBody, CompletionBody, read

Handler = Callable[[Request], Awaitable[Response]]

_READ_SECONDS = 30.0
"""How long a client may take to send its request."""
_SEND_SECONDS = 30.0
"""How long a client may not read what it is sent: it keeps the engine from the others."""
_GONE = 499
"""The status that stands for a client that has hung up, in the metrics."""


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Args:
        body: bytes of a request.
        tokens: of an answer; None: what the context has room for.
        seconds: that the engine works on an answer, which then ends.
        waiting: clients that wait for those who are served.
        parallel: answers that are computed together.
        forget: whether a conversation that leaves no room for its answer is read without its oldest turns.
    """

    body: int = 1_000_000
    tokens: int | None = None
    seconds: float = 600.0
    waiting: int = 16
    forget: bool = False
    parallel: int = 4


class Service:
    """One engine, and all who want something from it.

    Args:
        engine: used by nobody else.
        name: of the model, as clients have to call it.
        created: when the model's file was written, in seconds since 1970.
        api_key: what clients have to show, if anything.
        limits: what they may ask for.
    """

    def __init__(
        self, engine: Engine, name: str, created: int, api_key: str | None, limits: Limits
    ) -> None:
        self._engine, self._name, self._created = engine, name, created
        self._api_key, self._limits = api_key, limits
        self._line, self._metrics = Line(limits.parallel, limits.waiting), Metrics()
        self._passes = Passes(engine, limits.parallel, self._metrics.count_work)
        self._closing = False
        self._facts = {
            "model": name,
            "chat": engine.has_chat_template,
            "token_widths": engine.widths() is not None,
            **asdict(engine.info),
        }

    def close(self) -> None:
        """End every answer that is being computed or waited for, with an error."""
        self._closing = True

    def app(self) -> Starlette:
        """The application."""
        routes: list[tuple[str, str, Handler, bool]] = [
            ("GET", "/", self._page, False),
            ("GET", "/health", self._health, False),
            ("GET", "/info", self._info, True),
            ("GET", "/metrics", self._show_metrics, True),
            ("GET", "/v1/models", self._models, True),
            ("GET", "/v1/models/{model:path}", self._model, True),
            ("POST", "/v1/completions", self._complete, True),
            ("POST", "/v1/chat/completions", self._chat, True),
            ("POST", "/v1/embeddings", self._embed, True),
        ]
        return Starlette(
            routes=[
                Route(path, self._guarded(path, handler, needs_key), methods=[method])
                for method, path, handler, needs_key in routes
            ],
            exception_handlers={HTTPException: _no_route, Exception: _broken},
        )

    def _guarded(self, path: str, handler: Handler, needs_key: bool) -> Handler:
        """A handler whose clients have shown their key, whose errors are answers, and which is counted."""

        async def guarded(request: Request) -> Response:
            try:
                if needs_key:
                    self._check_key(request)
                response = await handler(request)
            except RequestError as error:
                response = _error(error)
            except (GoneError, ClientDisconnect):
                response = Response(status_code=_GONE)
            self._metrics.count_request(path, response.status_code)
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        key = self._api_key
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    async def _info(self, request: Request) -> Response:
        """What the page shows of the engine."""
        return JSONResponse(self._facts)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        text = self._metrics.text(len(self._line))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "squat",
        }

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._name):
            raise RequestError(
                404,
                f"the model {name!r:.60} does not exist; this server has {self._name!r}",
                param="model",
                code="model_not_found",
            )

    async def _complete(self, request: Request) -> Response:
        body = await self._read(request, CompletionBody)
        prompt = body.prompt
        return await self._answer(request, body, lambda: self._prompt_tokens(prompt))

    def _prompt_tokens(self, prompt: str | list[int], field: str = "prompt") -> list[int]:
        if isinstance(prompt, str):
            return self._engine.tokenize(prompt)
        size = self._engine.info.vocab_size
        if (largest := max(prompt, default=0)) >= size:
            raise RequestError(
                400,
                f"{field}: token {largest} is outside the model's vocabulary of {size}",
                param=field,
            )
        return prompt

    async def _embed(self, request: Request) -> Response:
        body = await self._read(request, EmbeddingBody)
        size = self._engine.info.hidden_size
        if body.dimensions not in (None, size):
            raise RequestError(
                400,
                f"dimensions: {body.dimensions} is not supported; this model's vectors have {size}",
                param="dimensions",
            )
        with ExitStack() as stack:
            place = self._join()
            stack.callback(place.leave)
            try:
                texts = await run_in_threadpool(
                    lambda: [self._prompt_tokens(text, "input") for text in body.input]
                )
            except SquatError as error:
                raise RequestError(400, str(error), param="input") from None
            for ids in texts:
                if not ids:
                    raise RequestError(400, "input: a text has no tokens; leave it out", "input")
                self._check_context(ids, "input")
            await place.reach(request.is_disconnected)
            vectors = [vector async for vector in self._vectors(request, texts)]
        tokens = sum(map(len, texts))
        return JSONResponse(embedding_list(vectors, body.encoding_format, tokens, self._name))

    async def _vectors(
        self, request: Request, texts: list[list[int]]
    ) -> AsyncGenerator[NDArray[np.float32], None]:
        """A vector for each text, as long as there is a client and time; raises like `_pieces`."""
        begin = time.monotonic()
        for ids in texts:
            yield (await self._passes.alone(lambda engine: engine.embed([ids])))[0]  # noqa: B023
            self._metrics.count_prompt(len(ids))
            await self._check_wanted(request)
            if time.monotonic() - begin > self._limits.seconds:
                raise RequestError(
                    400,
                    f"input: its {len(texts)} texts take more than this server's "
                    f"{self._limits.seconds:.0f} seconds; send fewer at once",
                    param="input",
                )

    async def _check_wanted(self, request: Request) -> None:
        """Raises like `_pieces`."""
        if self._closing:
            raise RequestError(503, "the server was told to end; ask again later")
        if await request.is_disconnected():
            raise GoneError

    def _check_context(self, ids: list[int], field: str) -> None:
        context = self._engine.info.context
        if len(ids) > context:
            raise RequestError(
                400,
                f"{field}: has {len(ids)} tokens, and the model's context is {context}; shorten it",
                param=field,
                code="context_length_exceeded",
            )

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, ChatBody)
        messages, tools = body.conversation, body.callable_tools
        room = self._engine.room_of(self._limit(body)) if self._limits.forget else None
        return await self._answer(
            request, body, lambda: self._engine.chat_tokens(messages, tools, room)
        )

    async def _read(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        """The body of a request, checked."""
        try:
            content = await asyncio.wait_for(self._content(request), _READ_SECONDS)
        except asyncio.TimeoutError:
            raise RequestError(
                408, f"the request has not arrived in {_READ_SECONDS:.0f} seconds; send it again"
            ) from None
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"the body is no JSON: {error}") from None
        body = read(kind, parsed)
        self._check_model(body.model)
        return body

    async def _content(self, request: Request) -> bytes:
        content, limit = b"", self._limits.body
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise RequestError(413, f"the request has more than {limit} bytes; shorten it")
        return content

    async def _answer(
        self, request: Request, body: Body, tokens: Callable[[], list[int]]
    ) -> Response:
        limit = self._limit(body)
        with ExitStack() as stack:
            place = self._join()
            stack.callback(place.leave)
            generation = await self._generation(tokens, limit, body)
            first = body.shown_first
            answer = Answer(
                self._engine,
                generation,
                self._name,
                chat=isinstance(body, ChatBody),
                logprobs=body.top is not None,
                widths=body.token_widths,
                most_calls=body.most_calls,
                first=first if isinstance(first, str) else self._engine.detokenize(first),
            )
            if body.stream:
                stack.pop_all()  # it is the stream that leaves
                include_usage = body.stream_options.include_usage
                events = self._events(request, place, generation, answer, include_usage)
                return _Stream(events, place)
            async with aclosing(self._pieces(request, place, generation)) as pieces:
                async for piece in pieces:
                    answer.read(piece)
                    if answer.complete:
                        break
            answer.rest()
            return JSONResponse(await run_in_threadpool(answer.whole))

    def _limit(self, body: Body) -> int | None:
        """The most tokens of an answer; None: as many as there is room for."""
        asked, most = body.new_tokens, self._limits.tokens
        if asked is None:
            return min((n for n in (body.usual_tokens, most) if n is not None), default=None)
        if most is not None and asked > most:
            raise RequestError(
                400, f"max_tokens: {asked} is above this server's {most}", param="max_tokens"
            )
        return asked

    async def _generation(
        self, tokens: Callable[[], list[int]], limit: int | None, body: Body
    ) -> Generation:
        """The answer before its first token; with whatever is wrong with prompt and options."""
        try:
            ids = await run_in_threadpool(tokens)
            self._check_context(ids, "messages" if isinstance(body, ChatBody) else "prompt")
            return await run_in_threadpool(
                lambda: self._engine.generate(ids, limit, stream=True, **body.sampling)
            )
        except FormError as error:
            field = "tools" if body.most_calls != 0 else "response_format"
            raise RequestError(400, str(error), param=field) from None
        except ToolsError as error:
            raise RequestError(400, str(error), param=str(error).partition(":")[0]) from None
        except SquatError as error:
            raise RequestError(400, str(error)) from None

    def _join(self) -> Place:
        try:
            return self._line.join()
        except FullError:
            seconds = max(1, math.ceil(self._metrics.seconds_an_answer))
            raise RequestError(
                503,
                f"{len(self._line)} requests are being answered or wait; try again in {seconds} s",
                headers={"Retry-After": str(seconds)},
            ) from None

    async def _pieces(
        self, request: Request, place: Place, generation: Generation
    ) -> AsyncGenerator[str, None]:
        """The pieces of an answer, once it is its turn, as long as there is a client and time.

        Raises:
            GoneError: there is no client any more.
            RequestError: the server ends, or the form cannot be held to any further.
        """
        await place.reach(request.is_disconnected)
        part = await self._passes.join(generation)
        place.on_leaving(lambda: self._passes.leave(part))
        begin = time.monotonic()
        try:
            async with aclosing(self._passes.pieces(part)) as pieces:
                async for piece in pieces:
                    if piece:
                        yield piece
                    await self._check_wanted(request)
                    if time.monotonic() - begin > self._limits.seconds:
                        return
        except FormError as error:
            raise RequestError(400, str(error)) from None
        except SquatError as error:
            raise RequestError(500, str(error)) from None
        finally:
            self._metrics.count_answer(generation)

    async def _events(
        self,
        request: Request,
        place: Place,
        generation: Generation,
        answer: Answer,
        include_usage: bool,
    ) -> AsyncGenerator[str, None]:
        """The events of a stream."""
        if first := answer.first_chunk():
            yield event(first)
        try:
            async with aclosing(self._pieces(request, place, generation)) as pieces:
                async for piece in pieces:
                    for delta in answer.read(piece):
                        yield event(answer.chunk(delta))
                    if answer.complete:
                        break
        except GoneError:
            return
        except RequestError as error:
            yield event(error.content)
            return
        for delta in answer.rest():
            yield event(answer.chunk(delta))
        yield event(await run_in_threadpool(answer.last_chunk))
        if include_usage:
            yield event(answer.usage_chunk())
        yield DONE


class _Stream(StreamingResponse):
    """Server-sent events, after which the place is free, however they end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], place: Place) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._events, self._place = events, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, as long as the client reads."""
        stalled = False

        async def send_in_time(message: Message) -> None:
            nonlocal stalled
            try:
                await asyncio.wait_for(send(message), _SEND_SECONDS)
            except asyncio.TimeoutError:
                stalled = True
                raise

        try:
            await super().__call__(scope, receive, send_in_time)
        except Exception:
            if not stalled:
                raise
        finally:
            self._place.leave()
            await self._events.aclose()


def _error(error: RequestError) -> Response:
    """In ASCII: it may quote what is no text."""
    text = json.dumps(error.content)
    return Response(text, error.status, error.headers, media_type="application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path}: {error.detail}; docs/serving.md lists what there is"
    )
    return _error(RequestError(error.status_code, message, headers=error.headers))


async def _broken(request: Request, error: Exception) -> Response:
    """A bug: the server's log has it."""
    return _error(RequestError(500, "the server has made a mistake; its log says more"))
