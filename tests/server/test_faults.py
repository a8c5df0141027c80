"""What goes wrong outside: after each fault every page is back and the next request is answered.

One server on the real model, with a small pool and a short queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.live import wait_for
from tests.server.process import Served, events, served

FLAGS = (
    "--max-slots", "4", "--kv-tokens", "4096", "--page-size", "16", "--max-waiting", "32",
    "--threads", "1",
)  # fmt: skip
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(*FLAGS) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        wait_for(running.idle, 30)
        running.check_answers()


def connect(server: Served) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=30)


def request_bytes(body: dict[str, object]) -> bytes:
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


@pytest.mark.parametrize("sent", ["nothing", "half the headers", "half the body", "all"])
def test_a_client_leaves_while_it_asks(server: Served, sent: str) -> None:
    raw = request_bytes(LONG)
    parts = {"nothing": 0, "half the headers": 40, "half the body": len(raw) - 30, "all": len(raw)}
    for _ in range(5):
        with connect(server) as client:
            client.sendall(raw[: parts[sent]])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_leaves_in_the_middle_of_its_answer(server: Served, stream: bool) -> None:
    for _ in range(3):
        with connect(server) as client:
            client.sendall(request_bytes({**LONG, "stream": stream}))
            if stream:
                assert client.recv(2000).startswith(b"HTTP/1.1 200")
            wait_for(lambda: server.health()["running"] > 0, 20)
        wait_for(server.idle, 10)


def test_reset_instead_of_close(server: Served) -> None:
    client = connect(server)
    client.sendall(request_bytes(LONG))
    client.recv(500)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


def test_half_open_connections_hold_nobody_up(server: Served) -> None:
    """Open sockets that say nothing, or stop in the middle: others are answered meanwhile."""
    raw = request_bytes(LONG)
    with contextlib.ExitStack() as stack:
        for i in range(100):
            client = stack.enter_context(connect(server))
            client.sendall(raw[: (0, 30, len(raw) - 10)[i % 3]])
        server.check_answers()


def test_a_client_that_stops_reading_holds_nobody_up(server: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(connect(server))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(request_bytes({**LONG, "max_tokens": 60}))
        assert server.complete("Four, five,", max_tokens=30).status_code == 200


def test_a_thousand_connections(server: Served) -> None:
    """Each is answered: with a completion, or with a refusal that says when to come back."""

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        body = {"prompt": "Six,", "max_tokens": 1, "ignore_eos": True}
        return await client.post("/v1/completions", json=body)

    async def storm() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
            return await asyncio.gather(*(ask(client) for _ in range(1000)))

    replies = asyncio.run(storm())
    counts = Counter(reply.status_code for reply in replies)
    assert set(counts) <= {200, 429} and counts[200] >= 32, counts
    for reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
        (b"[" * 100_000, ""),
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", ""),
    ],
)
def test_malformed_bodies(server: Served, raw: bytes, says: str) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", content=raw, timeout=30)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_an_oversized_body_is_refused_by_its_size(server: Served, declared: bool) -> None:
    raw = b'{"prompt": "' + b"a" * (9 << 20) + b'"}'
    content = raw if declared else (raw[i : i + 65536] for i in range(0, len(raw), 65536))
    reply = httpx.post(f"{server.url}/v1/completions", content=content, timeout=30)
    assert reply.status_code == 413
    assert str(8 << 20) in reply.json()["error"]["message"]


def test_nonsense_instead_of_http(server: Served) -> None:
    with connect(server) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500))
        with contextlib.suppress(ConnectionError):
            client.recv(1000)


def test_the_engine_is_killed_while_it_answers(server: Served) -> None:
    """Who has begun hears of it at once; who waited is answered by the next engine."""
    begun, waiting = [], []

    def stream() -> None:
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=LONG) as reply,
        ):
            begun.append([*events(reply.iter_lines())][-1])

    def wait() -> None:
        waiting.append(server.complete("Seven, eight,", max_tokens=5))

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.health()["running"] == 4, 20)
    late = [threading.Thread(target=wait) for _ in range(3)]
    for thread in late:
        thread.start()
    wait_for(lambda: server.health()["waiting"] == 3, 20)
    time.sleep(0.3)
    (engine,) = server.children()
    os.kill(engine, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    assert len(begun) == 4, "a stream hangs after its engine died"
    assert all("error" in last for last in begun), begun
    for thread in late:
        thread.join(60)
    assert [reply.status_code for reply in waiting] == [200] * 3
    assert server.health()["status"] == "ok"
    assert server.children() != [engine]


def test_a_full_disk_for_logs_and_recording(tmp_path: Path) -> None:
    """Files may grow to 2,000 bytes here, which the start alone nearly fills."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log, recording = tmp_path / "log", tmp_path / "run.jsonl"
    with (
        log.open("w") as full,
        served(*FLAGS, "--record", str(recording), log=full, port=port, file_bytes=2000) as running,
    ):
        for _ in range(30):
            assert running.complete("", max_tokens=1).status_code == 400
            running.check_answers()
    assert log.stat().st_size == 2000
    assert recording.stat().st_size <= 2000
