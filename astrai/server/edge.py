"""What the routes share: bodies in, requests to the engine, its deltas out as a reply."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from astrai.front.admission import DeadlineExceeded, QueueFull, Refused, SlowReader
from astrai.front.intake import PromptTooLong
from astrai.front.sampling_params import MAX_N
from astrai.server.chat.format import ChatFormat
from astrai.server.http.errors import ERROR, ApiError
from astrai.server.http.fields import blame, parse_json
from astrai.server.http.guard import check_body, namespace_of
from astrai.server.http.streaming import EventStream, merge, unless_gone
from astrai.server.requests import OPENED, OpenRequest, RequestBook, chosen_id

if TYPE_CHECKING:
    from astrai.front.async_engine import AsyncEngine, StreamDelta
    from astrai.front.sampling_params import SamplingParams

    Deltas: TypeAlias = AsyncGenerator[tuple[int, StreamDelta], None]

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MAX_TIMEOUT = 7 * 86_400  # seconds
_MAX_REASON = 1000  # characters of an error that are kept after the request
# Prompts of one request.
MAX_PROMPTS = 2048
# Shorter texts encode in less time than a hop to another thread and back takes to matter.
_LONG_TEXT = 8192


class Call(NamedTuple):
    """What a request asks of the engine, besides the prompt."""

    params: SamplingParams
    priority: int
    stream: bool
    include_usage: bool = False
    cache_salt: str | None = None
    request_id: str | None = None
    timeout: float | None = None  # seconds


class Reply(Protocol):
    """One response in the making: the deltas of choice `index` in, a body out."""

    id: str
    model: str

    def add(self, index: int, delta: StreamDelta) -> None: ...

    def whole(self) -> dict[str, Any]: ...


class StreamReply(Reply, Protocol):
    """One that can go out as events instead."""

    def events(self, index: int, delta: StreamDelta) -> Iterable[bytes]:
        """The events that say what `delta` brought: none if it brought nothing that shows."""

    def end(self) -> Iterable[bytes]:
        """The events after the last delta."""

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """The last events of a stream that ends with an error."""


class Edge:
    """Owns names, limits and the book of requests: the engine does the work."""

    def __init__(
        self,
        engine: AsyncEngine,
        names: tuple[str, ...],
        max_body_bytes: int,
        chat_format: ChatFormat,
        request_timeout: float | None = None,
    ) -> None:
        self.engine = engine
        self.request_timeout = request_timeout  # seconds, of requests that do not say themselves
        self.chat_format = chat_format
        self.names = names
        self.max_body_bytes = max_body_bytes
        self.requests = RequestBook()

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
        raw = bytes(body)
        parsed = parse_json(raw)
        check_body(raw, parsed)
        return parsed

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            f"the body has at least {size} bytes, expected at most {self.max_body_bytes}",
            status=413,
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
        self, request: Request, reply: StreamReply, call: Call, prompts: list[list[int]], param: str
    ) -> Response:
        """Run `prompts` and send what `reply` makes of their deltas, whole or as events.

        `param` is the field to blame for a prompt that does not fit.
        """
        if not call.stream:
            return await self.answer_whole(request, reply, call, prompts, param)
        opened = self._enter(request, reply, call, prompts, param)
        with self._ended_by_error(opened, param):
            source = self._deltas(opened, call, prompts)
            first = await _first(request, source)
            events = self._events(request, opened, reply, first, source)
            return EventStream(events, source, opened.headers)

    async def answer_whole(
        self, request: Request, reply: Reply, call: Call, prompts: list[list[int]], param: str
    ) -> Response:
        opened = self._enter(request, reply, call, prompts, param)
        with self._ended_by_error(opened, param):
            async with aclosing(self._deltas(opened, call, prompts)) as source:
                await unless_gone(request.receive, _collect(reply, source))
            return JSONResponse(reply.whole(), headers=opened.headers)

    @contextmanager
    def _ended_by_error(self, opened: OpenRequest, param: str) -> Iterator[None]:
        """What goes wrong before the first byte of an answer is an HTTP error, and in the book."""
        try:
            yield
        except BaseException as error:
            self.requests.close(opened, _reason(error))
            if isinstance(error, (ApiError, ClientDisconnect)) or not isinstance(error, Exception):
                raise
            raise api_error(error, param) from None

    def _enter(
        self, request: Request, reply: Reply, call: Call, prompts: list[list[int]], param: str
    ) -> OpenRequest:
        """Put it in the book; the reply takes the id it has there."""
        if len(prompts) > MAX_PROMPTS:
            raise ApiError(f"{len(prompts)} prompts, expected at most {MAX_PROMPTS}", param=param)
        n_choices = len(prompts) * call.params.n
        if n_choices > MAX_N:
            raise ApiError(
                f"{len(prompts)} prompts with n = {call.params.n} are {n_choices} choices, "
                f"expected at most {MAX_N}",
                param="n",
            )
        header = ("x-request-id", request.headers.get("x-request-id"))
        opened = OpenRequest(
            id=chosen_id(header, ("request_id", call.request_id)) or reply.id,
            route=request.url.path,
            model=reply.model,
            owner=namespace_of(request),
            namespace=namespace_of(request, call.cache_salt),
            n_prompts=len(prompts),
            n_choices=n_choices,
            timeout=self._timeout(request, call),
        )
        self.requests.open(opened)
        request.scope[OPENED] = opened
        reply.id = opened.id
        return opened

    def _timeout(self, request: Request, call: Call) -> float | None:
        """The least of what header and body ask for; without either the server's own."""
        asked = [("timeout", call.timeout)]
        if (header := request.headers.get("x-request-timeout")) is not None:
            try:
                asked.append(("x-request-timeout", float(header)))
            except ValueError:
                message = f"x-request-timeout = {header!r}, expected seconds"
                raise ApiError(message, param="x-request-timeout") from None
        given = [seconds for _, seconds in asked if seconds is not None]
        for name, seconds in asked:
            if seconds is not None and not 0 < seconds <= _MAX_TIMEOUT:
                message = f"{name} = {seconds:g}, expected seconds in (0, {_MAX_TIMEOUT}]"
                raise ApiError(message, param=name)
        return min(given) if given else self.request_timeout

    async def _deltas(self, opened: OpenRequest, call: Call, prompts: list[list[int]]) -> Deltas:
        """One stream per prompt, merged, each delta with the number of its choice; all noted."""
        source = merge(
            [
                self.engine.stream(
                    ids,
                    call.params,
                    request_id=name,
                    namespace=opened.namespace,
                    priority=call.priority,
                    timeout=opened.timeout,
                )
                for name, ids in zip(opened.engine_ids, prompts)
            ]
        )
        why: str | None = None
        try:
            async with aclosing(source):
                async for i, delta in source:
                    index = i * call.params.n + delta.index
                    opened.note(index, delta)
                    _raise_if_failed(delta, opened)
                    yield index, delta
        except BaseException as error:
            why = _reason(error)
            raise
        finally:
            self.requests.close(opened, why)

    async def _events(
        self,
        request: Request,
        opened: OpenRequest,
        reply: StreamReply,
        first: tuple[int, StreamDelta],
        source: Deltas,
    ) -> AsyncGenerator[bytes, None]:
        """The reply as events; an error after the first is an event too, and the last one."""
        try:
            for event in reply.events(*first):
                yield event
            async for index, delta in source:
                for event in reply.events(index, delta):
                    yield event
            for event in reply.end():
                yield event
        except Exception as error:
            self.requests.close(opened, _reason(error))  # before `source`, which was only left
            refusal = error if isinstance(error, ApiError) else api_error(error, None)
            request.scope[ERROR] = refusal
            for event in reply.failed(refusal):
                yield event


def _reason(error: BaseException) -> str | None:
    """What the book says of how a request ended; a client that leaves closes the generator."""
    if isinstance(error, (GeneratorExit, ClientDisconnect, asyncio.CancelledError)):
        return "the client left"
    return str(error)[:_MAX_REASON] or type(error).__name__


async def _first(request: Request, source: Deltas) -> tuple[int, StreamDelta]:
    """What comes first, so that an error before any token is still an HTTP status."""
    try:
        return await unless_gone(request.receive, _next(source))
    except BaseException:
        await source.aclose()
        raise


async def _next(source: Deltas) -> tuple[int, StreamDelta]:
    async for item in source:
        return item
    raise RuntimeError("the engine's stream ended before its first delta")


async def _collect(reply: Reply, source: Deltas) -> None:
    async for index, delta in source:
        reply.add(index, delta)


def _raise_if_failed(delta: StreamDelta, opened: OpenRequest) -> None:
    if delta.finish_reason == "error":
        raise ApiError(delta.error or "the engine failed", status=500)
    if delta.finish_reason == "abort" and opened.aborted:
        # Not a status that clients try again on.
        raise ApiError(f"aborted by DELETE /v1/requests/{opened.id}", status=499, code="aborted")
    if delta.finish_reason == "abort":
        raise ApiError(delta.error or "the request was aborted", status=503)


def api_error(error: Exception, param: str | None) -> ApiError:
    """What the engine refused, or failed at, as the HTTP error that it is."""
    if isinstance(error, PromptTooLong):
        return ApiError(str(error), param=param, code="context_length_exceeded")
    if isinstance(error, Refused):
        full = isinstance(error, QueueFull)
        return ApiError(
            str(error),
            status=429 if full else 503,
            code="queue_full" if full else "shutting_down",
            retry_after=error.retry_after,
        )
    if isinstance(error, DeadlineExceeded):
        return ApiError(str(error), status=504, code="deadline_exceeded")
    if isinstance(error, SlowReader):
        return ApiError(str(error), status=503, code="slow_reader")
    if isinstance(error, ValueError):
        refusal = blame(error)
        if refusal.param == "prompt" and param is not None:
            refusal.param = param
        return refusal
    logger.error("the engine failed", exc_info=error)
    return ApiError(f"internal error: {type(error).__name__}: {error}", status=500)


async def off_loop(n_characters: int, work: Callable[[], T]) -> T:
    """`work()`, in another thread if it has much text to go through."""
    return await asyncio.to_thread(work) if n_characters > _LONG_TEXT else work()
