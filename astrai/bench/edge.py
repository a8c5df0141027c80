"""What HTTP costs: many streams of an engine that computes nothing, through `astrai serve`.

The engine ticks at a fixed pace whatever the load, so what reaches the clients is what the edge can
carry, and a delta's price is the server's processor time over the deltas sent.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from astrai.bench._common import finish, parser
from astrai.bench._null import NullRunner
from astrai.config import EngineConfig, SchedulerConfig
from astrai.front.intake import Limits
from astrai.inference.cache.books import Books
from astrai.inference.engine import Engine
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Done, Plan
from astrai.models.tokenizer import ByteTokenizer
from astrai.process.link import Assembled, Budget, Deliver, Front

_PROGRAM = """
import functools
from astrai.process import engine_process
link = functools.partial(engine_process.ProcessLink, builder="astrai.bench.edge:build")
engine_process.ProcessLink = link
from astrai.cli.app import main
main()
"""
_TICK = "ASTRAI_BENCH_TICK"  # seconds; for the engine's process


class _PacedRunner(NullRunner):
    """Says "a" for every entry, and makes every tick take `seconds` of wall clock."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._token = self._token._replace(token=97)
        self._seconds = seconds
        self._due = 0.0

    def launch(self, plan: Plan) -> Done:
        now = time.monotonic()
        self._due = max(self._due + self._seconds, now)
        time.sleep(self._due - now)
        return super().launch(plan)


def build(config: EngineConfig, deliver: Deliver) -> Assembled:
    """An `assemble` without a model."""
    slots, size = config.max_slots or 256, config.page_size
    config = replace(config, max_slots=slots)
    n_pages = slots * 64
    events = EventLog()
    books = Books(n_pages, size, False, events)
    scheduler = Scheduler(SchedulerConfig(slots, 8192), books, time.monotonic, events)
    limits = Limits(n_pages * size, 258, (257,), n_pages, size)
    budget = Budget(0, 0, 0, n_pages * size, limits.max_model_len, "none", "cpu", 0.0)
    runner = _PacedRunner(float(os.environ[_TICK]))
    front = Front(config, limits, ByteTokenizer(), "null", budget)
    return Assembled(front, Engine(scheduler, runner, deliver, config.stall_seconds), None)


class Load(NamedTuple):
    seconds: float
    n_deltas: int
    n_tokens: int
    cpu: float  # of the server's process, in seconds


def main(argv: Sequence[str]) -> None:
    options = parser("edge", __doc__)
    options.add_argument("--streams", type=int, default=256)
    options.add_argument("--tokens", type=int, default=400, help="of each answer")
    options.add_argument("--tick-ms", type=float, default=10.0)
    options.add_argument("--route", choices=("chat", "completions"), default="chat")
    options.add_argument("--serve", default="", help="more flags of astrai serve")
    args = options.parse_args(argv)
    load = _measure(args)
    offered = args.streams / (args.tick_ms / 1000)
    rate = load.n_tokens / load.seconds
    result = {
        "streams": args.streams,
        "tick_ms": args.tick_ms,
        "offered_tokens_per_s": round(offered),
        "tokens_per_s": round(rate),
        "tokens": load.n_tokens,
        "deltas": load.n_deltas,
        "server_cpu_us_per_delta": round(1e6 * load.cpu / load.n_deltas, 1),
        "server_cpu_us_per_token": round(1e6 * load.cpu / load.n_tokens, 1),
        "server_cpu_share": round(load.cpu / load.seconds, 3),
    }
    lines = [f"{key:24} {value}" for key, value in result.items()]
    finish(args, "edge", lines, result)


def _measure(args: argparse.Namespace) -> Load:
    flags = ["serve", "--port", "0", "--max-slots", str(args.streams), *args.serve.split()]
    environment = {**os.environ, _TICK: str(args.tick_ms / 1000)}
    command = [sys.executable, "-c", _PROGRAM, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        if server.stdout is None:
            raise RuntimeError("the server has no standard output")
        port = 0
        for line in server.stdout:
            if line.startswith("ready in"):
                port = int(line.rpartition(":")[2].removesuffix("/v1\n"))
                break
        try:
            before = _cpu_seconds(server.pid)
            seconds, n_deltas, n_tokens = _drive(args, port)
            return Load(seconds, n_deltas, n_tokens, _cpu_seconds(server.pid) - before)
        finally:
            server.terminate()


def _drive(args: argparse.Namespace, port: int) -> tuple[float, int, int]:
    """Open all streams, and read until all have ended: seconds, deltas, tokens."""
    body: dict[str, Any] = {"max_tokens": args.tokens, "ignore_eos": True, "stream": True}
    if args.route == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "x" * 32}]
    else:
        path, body["prompt"] = "/v1/completions", "x" * 32
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    selector = selectors.DefaultSelector()
    started = time.perf_counter()
    for _ in range(args.streams):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(head.encode() + raw)
        selector.register(client, selectors.EVENT_READ, bytearray())
    seen = bytearray()
    open_streams = args.streams
    while open_streams:
        for key, _ in selector.select():
            got = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            key.data.extend(got)
            if not got or got.endswith((b"[DONE]\n\n\r\n", b"0\r\n\r\n")):
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                seen += key.data
                open_streams -= 1
    seconds = time.perf_counter() - started
    return seconds, *_count(bytes(seen))


def _count(answers: bytes) -> tuple[int, int]:
    """Deltas with text, and the tokens in them: every token is an "a"."""
    n_deltas = n_tokens = 0
    for line in answers.split(b"data: {")[1:]:
        text = line.partition(b'"content":"')[2] or line.partition(b'"text":"')[2]
        said = text.partition(b'"')[0]
        n_deltas += bool(said)
        n_tokens += len(said)
    return n_deltas, n_tokens


def _cpu_seconds(pid: int) -> float:
    """Processor time of one process so far, without its children."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
