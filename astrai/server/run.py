"""`astrai serve`: the port first, then the model, then the loop until a signal."""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

import astrai
from astrai.config import DoorConfig, EngineConfig
from astrai.front.async_engine import AsyncEngine
from astrai.observe.logs import configure
from astrai.runtime import collector
from astrai.server.http.keys import KeyRing, check_tls

if TYPE_CHECKING:
    from fastapi import FastAPI

    from astrai.observe.tracing import Tracing

EXIT_ENGINE_LOST = 70
_LAST_BYTES_SECONDS = 2  # for connections whose client does not take the end of its answer
_SEND_BUFFER = 256 << 10  # bytes of a connection that the system holds for a slow client
_DEAD_SECONDS = 60  # a client that takes nothing, not even a probe, for so long is gone


def serve(
    config: EngineConfig,
    *,
    host: str,
    port: int,
    names: Sequence[str],
    max_body_bytes: int,
    drain_seconds: int,
    door: DoorConfig,
    tool_parser: str,
    reasoning_parser: str,
    request_timeout: float | None,
    in_process: bool,
) -> int:
    """Answer until SIGINT or SIGTERM, then let open answers end for `drain_seconds`.

    The engine has a process of its own unless `in_process`. Returns the exit code: 0 after a
    drain, 1 if a second signal cut it short, EXIT_ENGINE_LOST if the engine could not be kept
    alive. Before the model is loaded it raises OSError, naming host and port, if the port is not
    free, and ValueError, OSError or ImportError, naming the flag, if the door cannot be had.
    """
    started = time.perf_counter()
    keys, tracing = KeyRing.gather(door.api_keys, door.api_key_file), _tracing(door)
    check_tls(door)
    with _bind(host, port) as listener:
        port = listener.getsockname()[1]
        logs = configure(door.log_format, door.log_level, prompts=door.log_prompts)
        print(f"AstrAI {astrai.__version__}: loading {config.model}", flush=True)
        engine = _engine(config, in_process)
        from astrai.server.app import create_app
        from astrai.server.chat.format import ChatFormat
        from astrai.server.http.door import Door

        served = tuple(names) or tuple(dict.fromkeys((engine.model_name, config.model)))
        app = create_app(
            engine,
            served_names=served,
            max_body_bytes=max_body_bytes,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            request_timeout=request_timeout,
            door=Door.of(door, keys, tracing),
        )

        def ready() -> None:
            seconds = time.perf_counter() - started
            parsers = ChatFormat(engine.tokenizer, tool_parser, reasoning_parser).line()
            lines = _ready_lines(engine, served[0], _url(host, port, door), seconds, parsers)
            print("\n".join(lines), flush=True)

        server = Server(_options(app, door), engine, ready, drain_seconds)
        try:
            server.run(sockets=[listener])
        except OSError as error:
            raise _taken(error, host, port) from None
    if tracing is not None:
        tracing.shutdown()
    logs.close()
    print(server.account(), file=sys.stderr, flush=True)
    return server.exit_code


def _options(app: FastAPI, door: DoorConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_protocol(),
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=door.tls_cert,
        ssl_keyfile=door.tls_key,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )


def _tracing(door: DoorConfig) -> Tracing | None:
    if door.otlp_endpoint is None:
        return None
    from astrai.observe.tracing import Tracing

    return Tracing.to_endpoint(door.otlp_endpoint)


def _protocol() -> Any:
    """Bounded heads, where the fast parser is installed; the other one has its own bound."""
    try:
        from astrai.server.http.connection import Connection
    except ImportError:
        return "h11"
    return Connection


def _engine(config: EngineConfig, in_process: bool) -> AsyncEngine:
    if in_process:
        return AsyncEngine(config)
    from astrai.process.engine_process import ProcessLink

    link = ProcessLink(config)
    # The child imports and loads meanwhile.
    importlib.import_module("astrai.server.app")
    return AsyncEngine(link=link)


class Server(uvicorn.Server):
    """Says when it is ready, and drains.

    At the first signal no request is admitted any more, and open ones have `drain_seconds` to end;
    connections are still taken, so that who comes is told. At the second, or after that time, what
    is open is told and ended. The same when the engine is lost for good.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        ready: Callable[[], None],
        drain_seconds: float,
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._engine = engine
        self._ready = ready
        self._drain_seconds = drain_seconds
        self._n_signals = 0
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        collector.settle()
        if self.started:  # not before a request sent at that moment would be answered
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        self._engine.stop_admitting()

    async def on_tick(self, counter: int) -> bool:
        if self._engine.ended is not None and not self.exit_code:
            print(f"astrai: error: {self._engine.ended}", file=sys.stderr, flush=True)
            self.exit_code = EXIT_ENGINE_LOST
            self._engine.stop_admitting()
        if self._draining is None and (self._n_signals or self.exit_code):
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        while self._engine.n_open and time.monotonic() < deadline and self._n_signals < 2:
            await asyncio.sleep(0.02)
        if self._engine.n_open and self._n_signals > 1:
            self.exit_code = self.exit_code or 1
        await self._engine.end_all("the server stopped before the answer was complete")
        self.should_exit = True

    def account(self) -> str:
        """What became of all requests, and of the pages."""
        counts, numbers = self._engine.counts, self._engine.healthy().numbers
        n_served = counts["stop"] + counts["length"]
        parts = [f"served {n_served} requests", f"{counts['error']} errors"]
        for name, text in (
            ("abort", "aborted"),
            ("DeadlineExceeded", "over their deadline"),
            ("SlowReader", "not read"),
            ("ShuttingDown", "cut at the end"),
        ):
            if counts[name]:
                parts.append(f"{counts[name]} {text}")
        free = numbers.get("pages_free", 0) + numbers.get("pages_cached", 0)
        parts.append(f"pages {free:.0f} free of {numbers.get('pages_total', 0):.0f}")
        return ", ".join(parts)


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet: until it is, a client is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror or error}") from None
    try:
        if sys.platform != "win32":  # there it would share the port instead of reusing it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bound(listener)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _taken(error, host, port) from None
    return listener


def _bound(listener: socket.socket) -> None:
    """What a connection may cost; accepted sockets inherit it.

    The system ends one whose other end is gone or takes nothing, which else would stay for ever,
    and holds a bounded number of bytes for a client that reads slowly, which else may be megabytes.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _DEAD_SECONDS // 2),
        ("TCP_KEEPINTVL", _DEAD_SECONDS // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _DEAD_SECONDS * 1000),
    ):
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def _taken(error: OSError, host: str, port: int) -> OSError:
    if error.errno == errno.EADDRINUSE:
        return OSError(f"{host}:{port} is in use: stop what listens there, or give another --port")
    return OSError(f"{host}:{port}: {error.strerror or error}")


def _url(host: str, port: int, door: DoorConfig) -> str:
    """Where a client on this machine reaches the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    if ":" in reachable:
        reachable = f"[{reachable}]"
    return f"{'http' if door.tls_cert is None else 'https'}://{reachable}:{port}"


def _ready_lines(
    engine: AsyncEngine, name: str, url: str, seconds: float, parsers: str
) -> list[str]:
    config = engine.config
    slots = (
        f"slots    {config.max_slots:8d}      context {engine.max_model_len} tokens, "
        f"pages of {config.page_size}"
    )
    return [
        *engine.budget.lines(),
        slots,
        *([f"chat     {parsers}"] if engine.tokenizer.chat_template is not None else []),
        f"ready in {seconds:.1f} s: {url}/v1",
        "",
        "Try:",
        *_curl(url, name, engine.tokenizer.chat_template is not None),
        f"Watch: {url}/live",
        "",
    ]


def _curl(url: str, name: str, chat: bool) -> list[str]:
    """A command that works as pasted in a POSIX shell."""
    asked: dict[str, object]
    if chat:
        path = "/v1/chat/completions"
        asked = {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    else:
        path = "/v1/completions"
        asked = {"prompt": "The sky is blue because"}
    body = json.dumps({"model": name, **asked, "max_tokens": 64, "temperature": 0}).replace(
        "'", "'\\''"
    )
    return [f"  curl {url}{path} -H 'Content-Type: application/json' \\", f"    -d '{body}'"]
