"""The app of one engine: its life, its errors, and the routes of every module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

import astrai
from astrai.server import errors
from astrai.server.edge import Edge
from astrai.server.routes import openai, status

if TYPE_CHECKING:
    from astrai.inference.async_engine import AsyncEngine

MAX_BODY_BYTES = 8 << 20


def create_app(
    engine: AsyncEngine,
    *,
    served_names: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The app of one engine, which it starts and shuts down with itself.

    `served_names` are the names that `model` may say, the first being the one in answers; without
    any it is the engine's own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
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
    edge = Edge(engine, tuple(served_names) or (engine.model_name,), max_body_bytes)
    for module in (status, openai):
        module.mount(app, edge)
    return app
