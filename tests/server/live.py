"""A server on an ephemeral port of this machine, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from astrai.server.app import create_app


def serving(engine: Any, **options: Any) -> contextlib.AbstractContextManager[str]:
    """The base URL of `engine` served over HTTP until the block ends."""
    return serving_app(create_app(engine, **options))


@contextlib.contextmanager
def serving_app(app: Any, *, send_buffer: int | None = None, **options: Any) -> Iterator[str]:
    """The base URL of an app served over HTTP until the block ends; `options` are uvicorn's.

    `send_buffer`: bytes that the system holds for a client that reads slowly.
    """
    with socket.socket() as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive())
            if not server.started:
                raise RuntimeError("the server did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.005)
