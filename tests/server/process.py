"""`astrai serve` as its users run it: a process of its own, on an ephemeral port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx

from tests.server.live import wait_for

_READY = re.compile(r"ready in .* (http://[\d.:]+)/v1")


class Served:
    """A running server. Owns its process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health", timeout=10).json()

    def idle(self) -> bool:
        """Nothing runs or waits, and every page is back."""
        now = self.health()
        back = now["pages_free"] + now["pages_cached"] == now["pages_total"]
        return bool(back and now["pages_held"] == now["running"] == now["waiting"] == 0)

    def check_answers(self) -> None:
        """The next request is answered, and afterwards every page is back."""
        reply = self.complete("One, two, three,", max_tokens=4)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 4
        wait_for(self.idle, 20)

    def complete(self, prompt: str, **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "ignore_eos": True, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def children(self) -> list[int]:
        """Process ids of the server's children."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.process.pid and fields[0] != "Z":
                    found.append(int(stat.parent.name))
        return found

    def terminate(self, seconds: float = 20) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextlib.contextmanager
def served(
    *flags: str, log: IO[str] | None = None, port: int = 0, file_bytes: int | None = None
) -> Iterator[Served]:
    """`astrai serve` with `flags` until the block ends; the lines it prints go to `log`.

    Past `file_bytes` a file that it writes is as one on a full disk.
    """

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    command = [sys.executable, "-c", "from astrai.cli.app import main; main()", "serve"]
    command += ["--port", str(port), *flags]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE if log is None else log, stderr=subprocess.STDOUT,
        text=True, env=env, preexec_fn=limit,
    ) as process:  # fmt: skip
        try:
            url = _url(process) if log is None else f"http://127.0.0.1:{port}"
            server = Served(process, url)
            wait_for(lambda: _alive(server), 60)
            yield server
        finally:
            process.kill()


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if found := _READY.search(line):
            return found.group(1)
    raise RuntimeError("the server ended before it was ready:\n" + "".join(printed))


def _alive(server: Served) -> bool:
    if server.process.poll() is not None:
        raise RuntimeError(f"the server ended with {server.process.returncode}")
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    return False


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each event of a stream."""
    for line in lines:
        if line.startswith("data: ") and not line.endswith("[DONE]"):
            yield json.loads(line[6:])
