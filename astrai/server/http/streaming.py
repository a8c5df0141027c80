"""Server-sent events, and work that ends the moment its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

# Made once: json.dumps would make an encoder for every event.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(payload: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event. JSON escapes line breaks, so the payload is always a single `data:` line."""
    data = b"data: " + _encode(payload).encode("utf-8") + b"\n\n"
    return data if name is None else b"event: " + name.encode("ascii") + b"\n" + data


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, with ClientDisconnect raised, if the client leaves.

    The request's body must have been read: after it the only message left is the disconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(i, item) of every stream as items come; closes all of them when it ends or is closed.

    One item per stream is asked for ahead, so a slow reader holds every stream back. All streams
    start before any item can come, so one that fails at its start fails before the first item.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    pending = {asyncio.ensure_future(_next(stream)): i for i, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()  # errors first
            for future in sorted(done, key=pending.__getitem__):
                i = pending.pop(future)
                for item in future.result():
                    pending[asyncio.ensure_future(_next(streams[i]))] = i
                    yield i, item
    finally:
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncIterator[T]) -> list[T]:
    """The next item, or nothing at the end."""
    async for item in stream:
        return [item]
    return []


class EventStream(Response):
    """Sends `events`; then, or as soon as the client is gone, closes them and their `source`.

    `source` is closed by itself because closing a generator that never started runs none of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self.events = events
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(aclosing(self.source))
            await stack.enter_async_context(aclosing(self.events))
            # The status is out: nobody is left to be told that the client has gone.
            with suppress(ClientDisconnect):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for chunk in self.events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
