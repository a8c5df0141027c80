"""`/v1/requests/{id}`: what became of a request, and its end by demand."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.server.edge import Edge
from astrai.server.http.guard import namespace_of


def mount(app: FastAPI, edge: Edge) -> None:
    @app.get("/v1/requests/{id}")
    async def state(id: str, request: Request) -> Response:
        return JSONResponse(edge.requests.find(id, namespace_of(request)).body())

    @app.delete("/v1/requests/{id}")
    async def abort(id: str, request: Request) -> Response:
        """What is said after the end stays; `aborted` tells whether there was anything to end."""
        found = edge.requests.find(id, namespace_of(request))
        found.aborted = found.ended is None
        ended = [edge.engine.abort(name) for name in found.engine_ids] if found.aborted else []
        return JSONResponse({"id": found.id, "object": "request", "aborted": any(ended)})
