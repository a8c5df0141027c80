"""Connections that cannot be held open, or filled, without ever sending a whole request."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from astrai.server.http.guard import MAX_HEADER_BYTES, MAX_URL_BYTES

# The parser keeps the head of a request until it is complete, however long that is, and what may
# stand behind a body in chunks for ever.
MAX_HEAD_BYTES = MAX_HEADER_BYTES + MAX_URL_BYTES
HEAD_SECONDS = 30.0
MESSAGE_SECONDS = 600.0  # for the largest body over a slow line
_FRAME_BYTES = 32  # around a piece of a body in chunks
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n\r\n"
    b"the head of the request has more than %d bytes" % MAX_HEAD_BYTES
)


class Connection(HttpToolsProtocol):
    """One connection, whose requests are bounded in time, and in the bytes that are no body.

    Owns how far the present request has come. The rest is the server's own protocol.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # of the present request: what is not its body
        self._complete = False  # no request is on its way
        self._another = False  # a request before it ended in the present data
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._another = False
        super().data_received(data)
        if self._complete or self._another or self.transport.is_closing():
            return
        self._head_bytes = max(0, self._head_bytes + len(data))
        if self._head_bytes > MAX_HEAD_BYTES:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._complete, self._head_bytes = False, 0
        self._time(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._time(MESSAGE_SECONDS)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes -= len(body) + _FRAME_BYTES
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._complete = self._another = True
        self._stop_timer()
        super().on_message_complete()

    def _time(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
