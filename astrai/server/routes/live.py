"""The live page: the document, and the stream of what it draws."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import FastAPI
from starlette.responses import Response

from astrai.observe.live.hub import Hub, TooManyViewers
from astrai.observe.live.page import page
from astrai.observe.live.source import LiveSource
from astrai.server.edge import Edge
from astrai.server.http.errors import ApiError
from astrai.server.http.streaming import EventStream


def mount(app: FastAPI, edge: Edge) -> None:
    engine = edge.engine
    source = LiveSource(lambda: engine.events)
    mount_hub(app, Hub(source, ending=lambda: engine.draining and not engine.n_open))


def mount_hub(app: FastAPI, hub: Hub) -> None:
    """`/live` holds nothing of the engine's, so it may be open to all; `/live/events` does."""

    @app.get("/live", include_in_schema=False)
    async def live() -> Response:
        html, headers = page()
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/live/events", include_in_schema=False)
    async def events() -> Response:
        frames = hub.watch()
        try:
            first = await anext(frames)
        except TooManyViewers as error:
            raise ApiError(str(error), status=503, code="too_many_viewers") from None
        return EventStream(_after(first, frames), frames, {})


async def _after(first: bytes, frames: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(frames):
        yield first
        async for frame in frames:
            yield frame
