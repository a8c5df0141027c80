"""What can be seen of the engine: `/metrics`, and why a request took its time."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.observe.metrics import CONTENT_TYPE
from astrai.observe.watch import Watch
from astrai.server.edge import Edge
from astrai.server.errors import ApiError
from astrai.server.guard import namespace_of


def mount(app: FastAPI, edge: Edge, watch: Watch) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(watch.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/v1/requests/{id}/why")
    async def why(id: str, request: Request) -> Response:
        """Its waits by reason with who held what, preemptions, prefix hits and misses, seconds."""
        opened = edge.requests.find(id, namespace_of(request))
        texts: list[str] = []
        prompts: list[dict[str, Any]] = []
        for name in opened.engine_ids:
            if (told := watch.why(name)) is not None:
                texts.append(told.text)
                prompts.append(told.data)
        if not prompts:
            raise ApiError(
                f"nothing is known of {id!r}: it did not reach the engine, or ended long ago",
                status=404,
                code="request_not_found",
            )
        if len(texts) > 1:
            texts = [f"prompt {i}: {text}" for i, text in enumerate(texts)]
        return JSONResponse(
            {"id": opened.id, "object": "why", "text": "\n".join(texts), "prompts": prompts}
        )
