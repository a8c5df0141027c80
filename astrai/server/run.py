"""`astrai serve`: the port first, then the model, then the loop until a signal."""

from __future__ import annotations

import errno
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence

import uvicorn

import astrai
from astrai.config import EngineConfig
from astrai.inference.async_engine import AsyncEngine
from astrai.server.app import create_app


def serve(
    config: EngineConfig,
    *,
    host: str,
    port: int,
    names: Sequence[str],
    max_body_bytes: int,
    drain_seconds: int,
    access_log: bool,
) -> None:
    """Answer until SIGINT or SIGTERM, then let open answers end for `drain_seconds`.

    Raises OSError, naming host and port, before the model is loaded if the port is not free.
    """
    started = time.perf_counter()
    with _bind(host, port) as listener:
        port = listener.getsockname()[1]
        print(f"AstrAI {astrai.__version__}: loading {config.model}", flush=True)
        engine = AsyncEngine(config)
        served = tuple(names) or tuple(dict.fromkeys((engine.model_name, config.model)))
        app = create_app(engine, served_names=served, max_body_bytes=max_body_bytes)

        def ready() -> None:
            seconds = time.perf_counter() - started
            print("\n".join(_ready_lines(engine, served[0], host, port, seconds)), flush=True)

        server = _Server(
            uvicorn.Config(
                app,
                log_level="info" if access_log else "warning",
                access_log=access_log,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=drain_seconds,
            ),
            ready,
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # the signal that ended it, raised again after a clean end
            print("stopped", file=sys.stderr)
        except OSError as error:
            raise _taken(error, host, port) from None


class _Server(uvicorn.Server):
    """Says when it is ready: not before a request sent at that moment would be answered."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()


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
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _taken(error, host, port) from None
    return listener


def _taken(error: OSError, host: str, port: int) -> OSError:
    if error.errno == errno.EADDRINUSE:
        return OSError(f"{host}:{port} is in use: stop what listens there, or give another --port")
    return OSError(f"{host}:{port}: {error.strerror or error}")


def _ready_lines(engine: AsyncEngine, name: str, host: str, port: int, seconds: float) -> list[str]:
    config = engine.config
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    if ":" in reachable:
        reachable = f"[{reachable}]"
    url = f"http://{reachable}:{port}"
    slots = (
        f"slots    {config.max_slots:8d}      context {engine.max_model_len} tokens, "
        f"pages of {config.page_size}"
    )
    return [
        *engine.budget.lines(),
        slots,
        f"ready in {seconds:.1f} s: {url}/v1",
        "",
        "Try:",
        *_curl(url, name, engine.tokenizer.has_chat_template),
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
