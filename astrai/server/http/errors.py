"""Every refusal leaves in one shape: {"error": {"message", "type", "param", "code"}}.

Below /v1/messages that is Anthropic's: {"type": "error", "error": {"type", "message"}}.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

logger = logging.getLogger(__name__)

ERROR = "astrai.error"  # where the ApiError that ended a request stands in its ASGI scope

# An error quotes what it refuses, which may be as long as a body may be.
_MAX_MESSAGE = 2000
_MAX_PARAM = 200

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "method_not_allowed_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that ends with an HTTP status; `param` names the field to blame."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,  # seconds
    ) -> None:
        message = _cut(message, _MAX_MESSAGE)
        super().__init__(message)
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        self.message = message
        self.status = status
        self.param = None if param is None else _cut(param, _MAX_PARAM)
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(
            self.status, "api_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """The error as the family of routes that `path` belongs to says it."""
        anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
        body = self.anthropic_body() if anthropic else self.body()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def _cut(text: str, limit: int) -> str:
    """`text`, without its middle if it is long: the end says what was expected."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def install(app: FastAPI) -> None:
    """Give every error of `app` the same shape, the router's own 404 and 405 included."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        request.scope[ERROR] = error
        return error.response(request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        path, method = request.url.path, request.method
        messages = {
            404: f"no route {path}",
            405: f"{path} does not take {method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        response = ApiError(message, status=error.status_code).response(path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        refusal = ApiError(f"internal error: {type(error).__name__}", status=500)
        return refusal.response(request.url.path)
