"""A recording in the live page: the same document and frames, from recorded events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

import astrai
from astrai.observe.live.hub import Hub
from astrai.observe.live.source import Event, Playback
from astrai.observe.ticks import Ticks
from astrai.observe.why import Why, WhyReader, told
from astrai.server.http import errors
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import parse_json
from astrai.server.routes.live import mount_hub

_MAX_BODY_BYTES = 1024
_KEEP_STORIES = 1 << 16
_CONTROLS: dict[str, type | tuple[type, ...]] = {
    "playing": bool,
    "speed": (int, float),
    "at": int,
    "step": int,
}


def create_playback_app(events: Iterable[Event], name: str) -> FastAPI:
    """The app that shows recorded `events`, which begin with a snapshot, under the title `name`.

    Raises ValueError if there is nothing to play.
    """
    events = list(events)
    playback = Playback(events)
    reader = WhyReader(n_ended=_KEEP_STORIES)
    ticks = Ticks(reader.apply)
    for event in events:
        ticks(*event)
    app = FastAPI(title="AstrAI", version=astrai.__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    mount_hub(app, Hub(playback))

    @app.post("/live/player", include_in_schema=False)
    async def player(request: Request) -> Response:
        asked = await _asked(request)
        try:
            playback.control(**asked)
        except ValueError as error:
            raise ApiError(str(error)) from None
        return JSONResponse(playback.player())

    @app.get("/v1/requests/{id}/why", include_in_schema=False)
    async def why(id: str) -> Response:
        found = _stories(reader, id)
        if not found:
            raise ApiError(f"the recording has no request {id!r}", status=404)
        return JSONResponse({"id": id, "object": "why", **told(found)})

    @app.get("/v1/models", include_in_schema=False)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    return app


def _stories(reader: WhyReader, id: str) -> list[Why]:
    """Of a request's one prompt, or of all of them: those are called id/0, id/1, …"""
    if (only := reader.why(id)) is not None:
        return [only]
    found: list[Why] = []
    while (story := reader.why(f"{id}/{len(found)}")) is not None:
        found.append(story)
    return found


async def _asked(request: Request) -> dict[str, Any]:
    body = await request.body()
    if len(body) > _MAX_BODY_BYTES:
        raise ApiError(f"the body has {len(body)} bytes, expected at most {_MAX_BODY_BYTES}")
    asked = parse_json(body)
    for field, value in asked.items():
        kind = _CONTROLS.get(field)
        if kind is None:
            raise ApiError(f"unknown field {field!r}, known: {', '.join(_CONTROLS)}", param=field)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ApiError(f"{field} = {value!r}, expected {kind}", param=field)
    return asked
