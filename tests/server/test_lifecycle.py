"""`astrai serve` from start to end, with the mock engine in a real process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.process.mock_engine import BUILDER, SLOW
from tests.server.live import wait_for

MAIN = f"""
import functools
from astrai.process import engine_process
engine_process.ProcessLink = functools.partial(engine_process.ProcessLink, builder={BUILDER!r})
from astrai.cli.app import main
main()
"""
ROOT = Path(__file__).parent.parent.parent
LONG = {"prompt": [SLOW, 65], "max_tokens": 800, "stream": True, "ignore_eos": True}


class Served:
    """A server of its own process; `url` is where it answers."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", "--port", "0", "--page-size", "16", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )
        self.url = self._url()
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def _url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready in"):
                return line.rpartition(" ")[2].strip().removesuffix("/v1")
        assert self.process.stderr is not None
        raise RuntimeError(self.process.stderr.read())

    @property
    def engine_pid(self) -> int:
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        (pid,) = [int(pid) for children in threads for pid in children.read_text().split()]
        return pid

    def end(self) -> tuple[int, str]:
        """The exit code, and the line of account."""
        code = self.process.wait(20)
        assert self.process.stderr is not None
        return code, self.process.stderr.read().splitlines()[-1]


@contextmanager
def serving(*flags: str) -> Iterator[Served]:
    served = Served(*flags)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, served: Served, body: dict[str, Any], wait: bool = True) -> None:
        super().__init__(daemon=True)
        self._served, self._body = served, body
        self.lines: list[str] = []
        self.start()
        wait_for(lambda: not wait or len(self.lines) > 3)

    def run(self) -> None:
        with contextlib.suppress(httpx.RemoteProtocolError):  # of a server that was killed
            self._read()

    def _read(self) -> None:
        with (
            httpx.Client(base_url=self._served.url, timeout=60, trust_env=False) as http,
            http.stream("POST", "/v1/completions", json=self._body) as response,
        ):
            self.lines.extend(line for line in response.iter_lines() if line)

    @property
    def last(self) -> Any:
        self.join(20)
        text = self.lines[-1].removeprefix("data: ")
        return text if text == "[DONE]" else json.loads(text)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def test_the_first_signal_drains_and_tells_who_comes() -> None:
    with serving() as served:
        stream = Stream(served, {**LONG, "max_tokens": 60})
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: served.http.get("/ready").status_code == 503)
        refused = served.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "shutting_down"
        assert served.http.get("/health").status_code == 200
        assert stream.last == "[DONE]"
        code, said = served.end()
    assert code == 0
    assert said == "served 1 requests, 0 errors, pages 64 free of 64"


def test_what_is_open_at_the_drain_deadline_is_told() -> None:
    with serving("--drain-seconds", "0") as served:
        stream = Stream(served, LONG)
        served.process.send_signal(signal.SIGINT)
        assert stream.last["error"]["code"] == "shutting_down"
        code, said = served.end()
    assert code == 0
    assert said == "served 0 requests, 0 errors, 1 cut at the end, pages 64 free of 64"


def test_the_second_signal_stops_now() -> None:
    with serving() as served:
        stream = Stream(served, LONG)
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: served.http.get("/ready").status_code == 503)
        started = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert "stopped before" in stream.last["error"]["message"]
        code, said = served.end()
    assert code == 1 and "1 cut at the end" in said
    assert time.monotonic() - started < 5


@needs_proc
def test_an_engine_killed_on_the_way_is_told_and_replaced() -> None:
    with serving() as served:
        stream = Stream(served, LONG)
        first = served.engine_pid
        os.kill(first, signal.SIGKILL)
        assert "SIGKILL" in stream.last["error"]["message"]
        answer = served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
        assert answer.status_code == 200
        wait_for(lambda: served.http.get("/health").status_code == 200)
        assert served.engine_pid != first
        served.process.send_signal(signal.SIGTERM)
        code, said = served.end()
    assert code == 0 and "served 1 requests, 1 errors" in said


@needs_proc
def test_the_engine_ends_when_the_server_dies() -> None:
    with serving() as served:
        pid = served.engine_pid
        Stream(served, LONG)
        served.process.kill()
        wait_for(lambda: gone(pid))


def test_a_request_has_a_deadline() -> None:
    with serving("--request-timeout", "0.3", "--max-slots", "1") as served:
        stream = Stream(served, LONG)
        # This one waits for the slot, and its own time runs out there.
        late = served.http.post(
            "/v1/completions", json={"prompt": "x"}, headers={"x-request-timeout": "0.05"}
        )
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        assert "0.05 s" in late.json()["error"]["message"]
        assert stream.last["error"]["code"] == "deadline_exceeded"
        body = {"prompt": "x", "timeout": -1}
        wrong = served.http.post("/v1/completions", json=body)
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "timeout"
        wait_for(lambda: served.http.get("/health").json()["pages_held"] == 0)


def test_a_full_queue_is_a_429_with_a_time() -> None:
    flags = ("--max-slots", "1", "--max-waiting", "1", "--max-waiting-tokens", "100")
    with serving(*flags) as served:
        Stream(served, LONG)
        waits = Stream(served, {"prompt": "x", "stream": True}, wait=False)
        wait_for(lambda: served.http.get("/health").json()["waiting"] == 1)
        full = served.http.post("/v1/completions", json={"prompt": "x"})
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        assert "1 requests wait, at most 1 may" in full.json()["error"]["message"]
        served.process.kill()
        waits.join(10)
