"""Minutes of mixed traffic on `astrai serve` with a small pool: does anything leak, hang or break?

Clients of every kind share one server: plain chats, streams that are left in the middle, aborts,
schemas, tools, shared prefixes, several choices, embeddings, and bodies that must be refused. At
the end nothing runs, every page is back, the memory of both processes is flat, and every status
is one that the request had to have. The last line is one JSON object; the exit code is 1 if
anything was not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from astrai.bench._common import commit, hardware  # noqa: E402
from tests.server.process import Served, served  # noqa: E402

FLAGS = ("--max-slots", "6", "--kv-tokens", "3072", "--page-size", "16", "--max-waiting", "24")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "degrees": {"type": "integer", "minimum": -50, "maximum": 60},
    },
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA},
}
PREFIX = "You are a careful assistant that answers in one short sentence. " * 8
# Past the queue's bound a request is refused; that is the bound at work, not an error.
BUSY = 429
# Bytes a process may grow from its second quarter to its last. The first quarter fills caches:
# compiled grammars, allocator pools, the prefix index.
_MEMORY_SLACK = 48 << 20


class Soak:
    """Clients of one server, and the counts of what they saw."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def note(self, kind: str, status: int, expected: tuple[int, ...], text: str = "") -> None:
        self.counts[f"{kind} {status}"] += 1
        if status not in expected:
            self.wrong.append(f"{kind}: {status} {text[:200]}")

    def check(self, kind: str, holds: bool, text: str) -> None:
        if not holds:
            self.wrong.append(f"{kind}: {text[:300]}")

    async def post(self, kind: str, path: str, body: dict[str, Any], *expected: int) -> Any:
        reply = await self.client.post(path, json=body)
        self.note(kind, reply.status_code, (*expected, BUSY), reply.text)
        return reply.json() if reply.status_code == 200 else None

    def messages(self, words: str = "Tell me something about the sea.") -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{words} ({self.random.randrange(1000)})"}]

    # ── the kinds of client ─────────────────────────────────────────────────────────────────────

    async def chat(self) -> None:
        n = self.random.randint(1, 60)
        body = {"messages": self.messages(), "max_tokens": n, "temperature": 0.8}
        if reply := await self.post("chat", "/v1/chat/completions", body, 200):
            self.check("chat", reply["usage"]["completion_tokens"] <= n, str(reply["usage"]))

    async def prefix(self) -> None:
        body = {"prompt": PREFIX + str(self.random.randrange(9)), "max_tokens": 8}
        await self.post("prefix", "/v1/completions", body, 200)

    async def choices(self) -> None:
        body = {"prompt": "A list of fruit:", "n": 3, "max_tokens": 12, "temperature": 1.0}
        if reply := await self.post("n", "/v1/completions", body, 200):
            self.check("n", len(reply["choices"]) == 3, str(reply))

    async def leave(self) -> None:
        """A stream whose client goes away after a few events, or at once."""
        body = {"messages": self.messages(), "max_tokens": 200, "stream": True, "ignore_eos": True}
        stop_after, seen = self.random.randrange(12), 0
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            self.note("leave", reply.status_code, (200, BUSY))
            if stop_after == 0:
                return
            async for line in reply.aiter_lines():
                seen += line.startswith("data:")
                if seen >= stop_after:
                    return

    async def abort(self) -> None:
        name = f"soak-{self.random.getrandbits(60):x}"
        body = {"prompt": "Count:", "max_tokens": 300, "ignore_eos": True}
        headers = {"x-request-id": name}
        asking = asyncio.ensure_future(
            self.client.post("/v1/completions", json=body, headers=headers)
        )
        await asyncio.sleep(self.random.random())
        ended = await self.client.delete(f"/v1/requests/{name}")
        reply = await asking
        self.note("abort", ended.status_code, (200, 202, 204, 404))
        self.note("aborted", reply.status_code, (200, 409, 499, 503, BUSY), reply.text)

    async def schema(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
        body = {"messages": self.messages("The weather?"), "response_format": form}
        reply = await self.post("schema", "/v1/chat/completions", body | {"max_tokens": 80}, 200)
        if reply and reply["choices"][0]["finish_reason"] == "stop":
            text = reply["choices"][0]["message"]["content"]
            self.check("schema", set(json.loads(text)) == {"city", "degrees"}, text)

    async def tools(self) -> None:
        body = {
            "messages": self.messages("What is the weather in Rome?"),
            "tools": [TOOL],
            "tool_choice": "required",
            "max_tokens": 90,
        }
        reply = await self.post("tools", "/v1/chat/completions", body, 200)
        if reply and reply["choices"][0]["finish_reason"] == "tool_calls":
            call = reply["choices"][0]["message"]["tool_calls"][0]["function"]
            self.check("tools", call["name"] == "weather", str(call))
            self.check("tools", "degrees" in json.loads(call["arguments"]), str(call))

    async def embed(self) -> None:
        body = {"input": ["the sea", "the " + "long " * self.random.randint(1, 80) + "way"]}
        if reply := await self.post("embeddings", "/v1/embeddings", body, 200):
            self.check("embeddings", len(reply["data"]) == 2, str(reply)[:80])

    async def refused(self) -> None:
        bodies: list[dict[str, Any]] = [
            {"prompt": "a", "max_tokens": -1},
            {"prompt": "a", "nonsense": 1},
            {"prompt": "word " * 20_000},
            {"prompt": "a", "max_tokens": 4, "structured_outputs": {"json": {"type": "nonsense"}}},
            {"prompt": "a", "max_tokens": 4, "structured_outputs": {"regex": "("}},
        ]
        await self.post("refused", "/v1/completions", self.random.choice(bodies), 400)

    async def one(self) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.chat, self.chat, self.chat, self.prefix, self.prefix, self.choices, self.leave,
            self.leave, self.abort, self.schema, self.tools, self.embed, self.refused,
        ]  # fmt: skip
        try:
            await self.random.choice(kinds)()
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.counts["failed"] += 1
            self.wrong.append(f"{type(error).__name__}: {error}")


async def traffic(url: str, seconds: float, clients: int, seed: int, watch: Watch) -> Soak:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        soak = Soak(client, seed)
        end = time.monotonic() + seconds

        async def visitor() -> None:
            while time.monotonic() < end:
                await soak.one()

        watching = asyncio.ensure_future(watch.run(end))
        await asyncio.gather(*(visitor() for _ in range(clients)))
        await watching
    return soak


class Watch:
    """The memory of the server's processes and the balance of its pages, once a second."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self.memory: list[list[int]] = []
        self.unbalanced: list[dict[str, Any]] = []

    async def run(self, end: float) -> None:
        while time.monotonic() < end:
            pids = [self.server.process.pid, *self.server.children()]
            self.memory.append([resident(pid) for pid in pids])
            now = await asyncio.to_thread(self.server.health)
            if now["pages_free"] + now["pages_cached"] + now["pages_held"] != now["pages_total"]:
                self.unbalanced.append(now)
            await asyncio.sleep(1)

    def quarters(self) -> list[list[int]]:
        """Of each process, the median of its bytes in each quarter of the run."""
        found = []
        for series in zip(*self.memory):
            size = max(len(series) // 4, 1)
            found.append([round(statistics.median(series[i * size :][:size])) for i in range(4)])
        return found


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=3)
    options.add_argument("--clients", type=int, default=24)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    with served(*FLAGS) as server:
        watch = Watch(server)
        soak = asyncio.run(traffic(server.url, 60 * args.minutes, args.clients, args.seed, watch))
        deadline = time.monotonic() + 30
        while not server.idle() and time.monotonic() < deadline:
            time.sleep(0.2)
        idle, last = server.idle(), server.health()
        code = server.terminate()
    memory = watch.quarters()
    flat = all(last - second < _MEMORY_SLACK for _, second, _, last in memory)
    good = idle and flat and code == 0 and not soak.wrong and not watch.unbalanced
    for text, n in Counter(soak.wrong).most_common(12):
        print(f"WRONG {n} x {text}")
    result = {
        "bench": "soak",
        "commit": commit(),
        "hardware": hardware(),
        "seed": args.seed,
        "minutes": args.minutes,
        "clients": args.clients,
        "requests": sum(soak.counts.values()),
        "counts": dict(sorted(soak.counts.items())),
        "wrong": len(soak.wrong),
        "unbalanced": len(watch.unbalanced),
        "all_pages_back": idle,
        "pages": {k: v for k, v in last.items() if k.startswith("pages_")},
        "memory_mib_by_quarter": [[round(b / 2**20, 1) for b in m] for m in memory],
        "memory_flat": flat,
        "exit_code": code,
        "good": good,
    }
    print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
