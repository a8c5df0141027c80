from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from astrai.server.app import create_app
from astrai.server.http import connection
from astrai.server.http.connection import MAX_HEAD_BYTES, Connection
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving_app

GET = b"GET /version HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connection, "MESSAGE_SECONDS", 0.6)
    with serving_app(create_app(FakeEngine()), http=Connection) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def answer(sock: socket.socket) -> bytes:
    """All that comes until the server closes, or nothing comes for two seconds."""
    sock.settimeout(2.0)
    said = b""
    while True:
        try:
            data = sock.recv(1 << 16)
        except ConnectionError:
            return said
        if not data:
            return said
        said += data


def test_a_head_that_never_ends_is_refused_at_the_bound(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(GET + b"x-filler: ")
        try:
            for _ in range(MAX_HEAD_BYTES // 1024 + 64):
                sock.sendall(b"x" * 1024)
        except ConnectionError:
            return
        assert b"431" in answer(sock)


@pytest.mark.parametrize("sent", [b"", b"GE", GET])
def test_a_connection_without_a_request_is_closed(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(sent)
        assert answer(sock) == b""


def test_a_second_request_on_a_connection_is_timed_anew(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(GET + b"\r\n" + GET)
        said = answer(sock)
        assert said.count(b"200 OK") == 1


def test_long_bodies_and_pipelined_requests_are_no_heads(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        body = b'{"prompt": "' + b"x" * (MAX_HEAD_BYTES * 2) + b'"}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        sock.sendall(head + body + GET + b"connection: close\r\n\r\n")
        said = answer(sock)
        assert b"context_length_exceeded" in said and b"200 OK" in said


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


def test_what_follows_a_body_in_chunks_is_bounded_too(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock, pytest.raises(ConnectionError):
        sock.sendall(POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        for _ in range(1000):
            sock.sendall(b"x: " + b"y" * 60_000 + b"\r\n")


def test_small_chunks_are_a_body(address: tuple[str, int]) -> None:
    text = b'{"prompt": "' + b"x" * (MAX_HEAD_BYTES // 4) + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
    with socket.create_connection(address) as sock:
        sock.sendall(POST + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n")
        sock.sendall(chunks + b"0\r\n\r\n")
        assert b"context_length_exceeded" in answer(sock)


def test_a_body_that_does_not_end_is_given_up(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(POST + b"content-length: 9\r\n\r\n{")
        assert answer(sock) == b""


def test_an_answer_may_take_longer_than_its_request(address: tuple[str, int]) -> None:
    body = b'{"prompt": "hang", "stream": true}'
    with socket.create_connection(address) as sock:
        sock.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):  # nothing more comes, and it stays open
            while sock.recv(1 << 16):
                continue
