"""Clients that stop reading: their tokens gather in larger pieces, within a bound."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest

from astrai.config import EngineConfig
from astrai.front.async_engine import AsyncEngine
from astrai.process.engine_process import ProcessLink
from astrai.server.app import create_app
from tests.server.live import serving_app, wait_for

N = 3000


@contextmanager
def engine(max_unread: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncEngine]:
    monkeypatch.setenv("ASTRAI_BENCH_TICK", "0.0005")
    link = ProcessLink(EngineConfig(max_slots=4), "astrai.bench.edge:build")
    try:
        yield AsyncEngine(link=link, max_unread=max_unread)
    finally:
        link.stop()


def tightly(engine: AsyncEngine) -> AbstractContextManager[str]:
    """Served with little room between server and client."""
    return serving_app(create_app(engine), send_buffer=8192)


def asking(url: str, n: int = N) -> socket.socket:
    """A client that has asked for `n` tokens, and has read nothing."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.settimeout(30)
    body = {"prompt": [65], "max_tokens": n, "ignore_eos": True, "stream": True, "seed": 1}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    client.sendall(head.encode() + raw)
    return client


def rest(client: socket.socket) -> list[Any]:
    """The events that come, until the stream ends."""
    got = bytearray()
    while not got.endswith(b"0\r\n\r\n"):
        piece = client.recv(1 << 16)
        if not piece:
            break
        got += piece
    text = bytearray()
    body = bytes(got).partition(b"\r\n\r\n")[2]
    while body:
        size, _, body = body.partition(b"\r\n")
        text += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    events = [line[6:] for line in text.decode().split("\n\n") if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def test_a_slow_client_gets_larger_pieces_and_delays_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine(1 << 20, monkeypatch) as slow, tightly(slow) as url:
        client = asking(url)
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            wait_for(lambda: slow.stats()["running"] == 1)
            started = time.monotonic()
            body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
            assert time.monotonic() - started < 5
            # Its engine work ends although nobody reads.
            wait_for(lambda: slow.stats()["running"] == 0, 60)
        events = rest(client)
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        assert len(events) < N / 2
        client.close()


def test_a_client_that_reads_nothing_is_ended_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(500, monkeypatch) as bounded, tightly(bounded) as url:
        client = asking(url)
        wait_for(lambda: bounded.stats()["running"] == 1)
        wait_for(lambda: bounded.stats()["running"] == 0, 60)
        assert bounded.stats()["pages_held"] == 0
        last = rest(client)[-1]
        assert last["error"]["code"] == "slow_reader"
        assert "at most 500 may" in last["error"]["message"]
        client.close()
        assert bounded.counts["SlowReader"] == 1
