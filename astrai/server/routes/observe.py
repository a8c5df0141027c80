"""What the readers of events know: `/metrics`, and `/v1/requests/{id}/why`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.observe.metrics import CONTENT_TYPE
from astrai.observe.watch import Watch
from astrai.observe.why import told
from astrai.server.edge import Edge
from astrai.server.http.errors import ApiError
from astrai.server.http.guard import namespace_of


def mount(app: FastAPI, edge: Edge, watch: Watch) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(watch.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/v1/requests/{id}/why")
    async def why(id: str, request: Request) -> Response:
        """Its waits by reason with who held what, preemptions, prefix hits and misses, seconds."""
        opened = edge.requests.find(id, namespace_of(request))
        stories = [story for name in opened.engine_ids if (story := watch.why(name)) is not None]
        if not stories:
            raise ApiError(
                f"nothing is known of {id!r}: it did not reach the engine, or ended long ago",
                status=404,
                code="request_not_found",
            )
        return JSONResponse({"id": opened.id, "object": "why", **told(stories)})
