"""The app of one engine: its life, its errors, and the routes of every module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

import astrai
from astrai.observe.watch import Watch
from astrai.server.chat.format import ChatFormat
from astrai.server.edge import Edge
from astrai.server.http import errors
from astrai.server.http.door import OPEN, Door
from astrai.server.routes import (
    anthropic,
    embeddings,
    live,
    observe,
    openai,
    requests,
    responses,
    status,
    tokens,
)

if TYPE_CHECKING:
    from astrai.front.async_engine import AsyncEngine

MAX_BODY_BYTES = 8 << 20


def create_app(
    engine: AsyncEngine,
    *,
    served_names: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    door: Door = OPEN,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    request_timeout: float | None = None,
) -> FastAPI:
    """The app of one engine, which it starts and shuts down with itself.

    `served_names` are the names that `model` may say, the first being the one in answers; without
    any it is the engine's own. The parsers' names are those of `ChatFormat`.
    `request_timeout` are the seconds of requests that do not bring their own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch.attach()
        engine.start()
        try:
            yield
        finally:
            await engine.shutdown()

    # The interactive pages load their scripts from elsewhere, so they are off.
    app = FastAPI(
        title="AstrAI",
        version=astrai.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app)
    watch = Watch(engine)
    door.guard(app, watch.metrics)
    chat_format = ChatFormat(engine.tokenizer, tool_parser, reasoning_parser)
    names = tuple(served_names) or (engine.model_name,)
    edge = Edge(engine, names, max_body_bytes, chat_format, request_timeout)
    for module in (status, requests, tokens, openai, responses, anthropic, embeddings, live):
        module.mount(app, edge)
    observe.mount(app, edge, watch)
    return app
