"""What the routes share: bodies in, requests to the engine, its deltas out as a reply."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from astrai.inference.intake import PromptTooLong, QueueFull
from astrai.server.errors import ApiError
from astrai.server.fields import blame, parse_json
from astrai.server.streaming import EventStream, merge, unless_gone

if TYPE_CHECKING:
    from astrai.inference.async_engine import AsyncEngine, StreamDelta
    from astrai.inference.sampling_params import SamplingParams

    Deltas: TypeAlias = AsyncGenerator[tuple[int, StreamDelta], None]

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Shorter texts encode in less time than a hop to another thread and back takes to matter.
_LONG_TEXT = 8192


class Call(NamedTuple):
    """What a request asks of the engine, besides the prompt."""

    params: SamplingParams
    model: str | None
    priority: int
    stream: bool
    include_usage: bool


class Reply(Protocol):
    """One response in the making: the deltas of choice `index` in, a body or events out."""

    id: str

    def add(self, index: int, delta: StreamDelta) -> None: ...

    def whole(self) -> dict[str, Any]: ...

    def events(self, index: int, delta: StreamDelta) -> Iterable[bytes]:
        """The events that say what `delta` brought: none if it brought nothing that shows."""

    def end(self) -> Iterable[bytes]:
        """The events after the last delta."""

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """The last events of a stream that ends with an error."""


class Edge:
    """Owns nothing but names and limits: the engine does the work and keeps the state."""

    def __init__(self, engine: AsyncEngine, names: tuple[str, ...], max_body_bytes: int) -> None:
        self.engine = engine
        self.names = names
        self.max_body_bytes = max_body_bytes

    # ── what comes in ───────────────────────────────────────────────────────────────────────────

    async def json(self, request: Request) -> dict[str, Any]:
        """The body of a request, a JSON object within the size limit."""
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise self._too_large(int(declared))
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body_bytes:
                raise self._too_large(len(body))
        return parse_json(bytes(body))

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            f"the body has at least {size} bytes, expected at most {self.max_body_bytes}",
            code="body_too_large",
        )

    def check_model(self, name: str | None) -> str:
        """The name to answer under; ApiError 404 if `name` is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                f"the model {name!r} is not served here; served: {', '.join(self.names)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name or self.names[0]

    @staticmethod
    def new_id(prefix: str) -> str:
        return f"{prefix}-{uuid.uuid4().hex}"

    # ── what goes out ───────────────────────────────────────────────────────────────────────────

    async def answer(
        self, request: Request, reply: Reply, call: Call, prompts: list[list[int]], param: str
    ) -> Response:
        """Run `prompts` and send what `reply` makes of their deltas, whole or as events.

        `param` is the field to blame for a prompt that does not fit.
        """
        headers = {"x-request-id": reply.id}
        try:
            source = self._open(reply.id, call, prompts)
            if call.stream:
                first = await _first(request, source)
                return EventStream(_events(reply, call, first, source), source, headers)
            async with aclosing(source):
                await unless_gone(request.receive, _collect(reply, call, source))
            return JSONResponse(reply.whole(), headers=headers)
        except (ApiError, ClientDisconnect):
            raise
        except Exception as error:
            raise api_error(error, param) from None

    def _open(self, id: str, call: Call, prompts: list[list[int]]) -> Deltas:
        """One stream per prompt, merged."""
        names = [id] if len(prompts) == 1 else [f"{id}-{i}" for i in range(len(prompts))]
        return merge(
            [
                self.engine.stream(ids, call.params, request_id=name, priority=call.priority)
                for name, ids in zip(names, prompts)
            ]
        )


async def _first(request: Request, source: Deltas) -> tuple[int, StreamDelta]:
    """What comes first, so that an error before any token is still an HTTP status."""
    try:
        first = await unless_gone(request.receive, _next(source))
        _raise_if_failed(first[1])
    except BaseException:
        await source.aclose()
        raise
    return first


async def _next(source: Deltas) -> tuple[int, StreamDelta]:
    async for item in source:
        return item
    raise RuntimeError("the engine's stream ended before its first delta")


async def _collect(reply: Reply, call: Call, source: Deltas) -> None:
    async for i, delta in source:
        _raise_if_failed(delta)
        reply.add(i * call.params.n + delta.index, delta)


async def _events(
    reply: Reply, call: Call, first: tuple[int, StreamDelta], source: Deltas
) -> AsyncGenerator[bytes, None]:
    """The reply as events; an error after the first is an event too, and the last one."""
    try:
        i, delta = first
        for event in reply.events(i * call.params.n + delta.index, delta):
            yield event
        async for i, delta in source:
            _raise_if_failed(delta)
            for event in reply.events(i * call.params.n + delta.index, delta):
                yield event
        for event in reply.end():
            yield event
    except Exception as error:
        for event in reply.failed(error if isinstance(error, ApiError) else api_error(error, None)):
            yield event


def _raise_if_failed(delta: StreamDelta) -> None:
    if delta.finish_reason == "error":
        raise ApiError(delta.error or "the engine failed", status=500)
    if delta.finish_reason == "abort":
        raise ApiError(delta.error or "the request was aborted", status=503)


def api_error(error: Exception, param: str | None) -> ApiError:
    """What the engine refused, or failed at, as the HTTP error that it is."""
    if isinstance(error, PromptTooLong):
        return ApiError(str(error), param=param, code="context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(str(error), status=503, code="queue_full")
    if isinstance(error, ValueError):
        return blame(error)
    logger.error("the engine failed", exc_info=error)
    return ApiError(f"internal error: {type(error).__name__}: {error}", status=500)


async def off_loop(n_characters: int, work: Callable[[], T]) -> T:
    """`work()`, in another thread if it has much text to go through."""
    return await asyncio.to_thread(work) if n_characters > _LONG_TEXT else work()
