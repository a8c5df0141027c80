"""One account of every request when it is over: a log line, a metric, a span. Plain ASGI."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astrai.observe.tracing import Phases
from astrai.server.http.errors import ERROR, ApiError
from astrai.server.http.guard import namespace_of
from astrai.server.requests import OPENED, OpenRequest

if TYPE_CHECKING:
    from astrai.observe.metrics import Metrics
    from astrai.observe.tracing import Tracing

logger = logging.getLogger("astrai.request")
trouble = logging.getLogger(__name__)

MAX_LOGGED_BODY = 64 << 10
# Asked every few seconds by machines: their lines would bury the others.
_QUIET = frozenset({"/health", "/ready", "/metrics"})


@dataclass(slots=True)
class _Account:
    """What is seen of a request on its way. `status` 499: the client left before the answer."""

    began: float  # Unix seconds
    status: int = 499
    ended: bool = False  # the last byte was handed over
    body: bytearray | None = None  # as far as it may be logged


class Access:
    """ASGI middleware around everything else.

    No line holds text of a prompt or an answer, nor an error's message, which may quote either;
    `log_prompts` adds the body as it came. Owns nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        log_prompts: bool = False,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        account = _Account(time.time(), body=bytearray() if self._log_prompts else None)
        begun = time.perf_counter()
        try:
            await self._app(
                scope,
                receive if account.body is None else _reading(account.body, receive),
                _watching(account, send),
            )
        except Exception as error:
            trouble.error("%s %s failed", scope["method"], _route(scope), exc_info=error)
            if account.status != 499:
                raise  # half an answer: the server closes the connection
            refusal = ApiError(f"internal error: {type(error).__name__}", status=500)
            account.status = 500
            await refusal.response(scope["path"])(scope, receive, send)
        finally:
            self._tell(scope, account, time.perf_counter() - begun)

    def _tell(self, scope: Scope, account: _Account, seconds: float) -> None:
        """What goes wrong in here must not become the request's."""
        try:
            route = _route(scope)
            if self._metrics is not None:
                self._metrics.http(scope["method"], route, account.status, seconds)
            told = _fields(scope, account, route, seconds)
            if self._tracing is not None and scope.get(OPENED) is not None:
                _trace(self._tracing, scope, account, route, seconds, told)
            if account.body is not None:
                told["body"] = bytes(account.body).decode("utf-8", errors="replace")
            quiet = route in _QUIET and account.status < 400
            level = logging.DEBUG if quiet else logging.INFO
            if logger.isEnabledFor(level):
                logger.log(level, "request", extra={"fields": told})
        except Exception:
            trouble.exception("the account of a request failed")


def _trace(
    tracing: Tracing,
    scope: Scope,
    account: _Account,
    route: str,
    seconds: float,
    told: dict[str, Any],
) -> None:
    opened: OpenRequest = scope[OPENED]
    usage = opened.usage
    tracing.record(
        f"{scope['method']} {route}",
        {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
        account.began,
        account.began + seconds,
        Phases(usage.queued, usage.prefill, usage.decode),
        {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": account.status,
            "gen_ai.request.model": opened.model,
            "gen_ai.usage.input_tokens": usage.prompt,
            "gen_ai.usage.output_tokens": usage.completion,
            "astrai.request_id": opened.id,
            "astrai.cached_tokens": usage.cached,
            "astrai.preemptions": usage.preemptions,
            "astrai.outcome": told["outcome"],
        },
        failed=account.status >= 500 or told["outcome"] == "failed",
    )


def _fields(scope: Scope, account: _Account, route: str, seconds: float) -> dict[str, Any]:
    opened: OpenRequest | None = scope.get(OPENED)
    error: ApiError | None = scope.get(ERROR)
    told: dict[str, Any] = {} if opened is None else {"request_id": opened.id}
    told |= {
        "method": scope["method"],
        "route": route,
        "status": account.status,
        "outcome": _outcome(account, opened),
        "seconds": round(seconds, 6),
    }
    if tenant := namespace_of(HTTPConnection(scope)):
        told["key"] = tenant
    if error is not None:
        told |= {"error_code": error.code, "error_param": error.param}
    if opened is not None:
        usage = opened.usage
        told |= {
            "model": opened.model,
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "finish": sorted({c.finish_reason or "none" for c in opened.choices.values()}),
            **usage.timings(),
        }
    return told


def _outcome(account: _Account, opened: OpenRequest | None) -> str:
    """What became of it, which the status of a stream cannot say."""
    if not account.ended:
        return "client left"
    if account.status >= 400 or (opened is not None and opened.error is not None):
        return "failed"
    return "answered"


def _route(scope: Scope) -> str:
    """The pattern of the route, so that metrics have few labels."""
    return getattr(scope.get("route"), "path", "none")


def _watching(account: _Account, send: Send) -> Send:
    async def watched(message: Message) -> None:
        if message["type"] == "http.response.start":
            account.status = message["status"]
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            account.ended = True

    return watched


def _reading(body: bytearray, receive: Receive) -> Callable[[], Any]:
    async def read() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            body.extend(message.get("body", b"")[: MAX_LOGGED_BODY - len(body)])
        return message

    return read
