"""The door: API keys, tenants, limits on what comes in. Plain ASGI: streams stay streams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from astrai.server.http.errors import ERROR, ApiError
from astrai.server.http.keys import KeyRing

MAX_HEADER_BYTES = 32 << 10
MAX_URL_BYTES = 8 << 10

# Answered without a key: nothing of any request is in them. /live is the empty page; what it shows
# comes from routes below it.
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/live"})
_TENANT = "astrai.tenant"  # where the name of the key stands in an ASGI scope


def namespace_of(request: HTTPConnection, cache_salt: str | None = None) -> str:
    """The prefix-cache tenant of a request: the name of its key, refined by `cache_salt`.

    Without keys everybody shares one namespace, and a salt parts it. Names hold no "/".
    """
    tenant: str = request.scope.get(_TENANT, "")
    return f"{tenant}/{cache_salt}" if cache_salt else tenant


class Guard:
    """ASGI middleware: no request passes without a key once there are keys, nor with huge headers.

    Answers in the shape of the route's family. Owns no state but the keys.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, *, open_metrics: bool = False) -> None:
        self._app = app
        self._keys = keys
        self._open = OPEN_PATHS | {"/metrics"} if open_metrics else OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            _check_headers(scope)
            self._check_key(scope)
        except ApiError as error:
            scope[ERROR] = error
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not len(self._keys):
            return
        key = _key_in(scope["headers"])
        if key is not None and (tenant := self._keys.tenant(key)) is not None:
            scope[_TENANT] = tenant
            return
        if scope["path"] in self._open:
            return
        raise ApiError(
            "no API key: send it as Authorization: Bearer KEY, or x-api-key: KEY"
            if key is None
            else "the API key is not known here",
            status=401,
            code="missing_api_key" if key is None else "invalid_api_key",
        )


def _key_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request brings; a bearer token goes before x-api-key."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and token.strip():
                return token.strip()
        elif name == b"x-api-key" and value.strip():
            found = value.strip()
    return found


def _check_headers(scope: Scope) -> None:
    size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        raise ApiError(
            f"the headers have {size} bytes, expected at most {MAX_HEADER_BYTES}", status=431
        )
    url = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    if url > MAX_URL_BYTES:
        raise ApiError(f"the URL has {url} bytes, expected at most {MAX_URL_BYTES}", status=414)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # the handshake; a close before the accept is an HTTP 403
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:120]})
        return
    response = error.response(scope["path"])
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    # A body that nobody reads would be taken for the connection's next request.
    response.headers["connection"] = "close"
    await response(scope, receive, send)


# ── what a body may hold ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bounds on the parts of a body; the whole is bounded in bytes before it is read."""

    max_messages: int = 4096
    max_message_bytes: int = 4 << 20
    max_tools_bytes: int = 512 << 10
    max_schema_bytes: int = 256 << 10
    max_depth: int = 64  # of arrays and objects in each other


LIMITS = BodyLimits()


# Fields that list messages, and fields that hold a schema, a grammar or the like, of all routes.
_MESSAGES = ("messages", "input")
_SCHEMAS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "text",
    "output_config",
)


def check_body(raw: bytes, body: Mapping[str, Any], limits: BodyLimits = LIMITS) -> None:
    """ApiError 400, with both numbers, if a part of `body`, parsed from `raw`, is too large.

    No part is larger than the whole, so a small body costs nothing but a few lookups.
    """
    _check_depth(raw, body, limits.max_depth)
    for name in _MESSAGES:
        messages = body.get(name)
        if not isinstance(messages, list) or not any(isinstance(m, dict) for m in messages):
            continue
        _at_most(len(messages), limits.max_messages, name, "messages")
        if len(raw) > limits.max_message_bytes:
            for i, message in enumerate(messages):
                _at_most(_size(message), limits.max_message_bytes, f"{name}[{i}]", "bytes")
    tools = body.get("tools")
    if isinstance(tools, list) and len(raw) > limits.max_tools_bytes:
        _at_most(_size(tools), limits.max_tools_bytes, "tools", "bytes")
    if len(raw) > limits.max_schema_bytes:
        for name in _SCHEMAS:
            if body.get(name) is not None:
                _at_most(_size(body[name]), limits.max_schema_bytes, name, "bytes")


def _at_most(n: int, limit: int, field: str, unit: str) -> None:
    if n > limit:
        raise ApiError(
            f"{field} has {n} {unit}, expected at most {limit}", param=field, code="too_large"
        )


def _size(value: Any) -> int:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return len(text.encode("utf-8", errors="surrogatepass"))


def _check_depth(raw: bytes, body: Any, limit: int) -> None:
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return
    level: list[Any] = [body]
    depth = 0
    while level:
        depth += 1
        if depth > limit:
            raise ApiError(
                f"the body nests deeper than {limit} levels of arrays and objects",
                code="too_deep",
            )
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
