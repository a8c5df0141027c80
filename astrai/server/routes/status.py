"""What is not about a request: is the engine well, which version is this."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.responses import Response

import astrai
from astrai.server.edge import Edge


def mount(app: FastAPI, edge: Edge) -> None:
    @app.get("/health")
    async def health() -> Response:
        ok, reason, numbers = edge.engine.healthy()
        body = {"status": "ok" if ok else "unhealthy", "reason": reason, **numbers}
        return JSONResponse(body, status_code=200 if ok else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether a request sent now would be taken: for whoever spreads the load."""
        ok, reason, _ = edge.engine.ready()
        body = {"status": "ready" if ok else "not ready", "reason": reason}
        return JSONResponse(body, status_code=200 if ok else 503)

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": astrai.__version__})
