"""Load on any OpenAI-compatible URL: Poisson arrivals or a closed loop, latencies and goodput."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import httpx
import numpy as np

from astrai.bench._common import finish, lognormal_lengths, parser

_PERCENTILES = (50, 90, 99)
_CHARACTERS_PER_TOKEN = 4  # of English prose, about: the report counts what the server counted


class Asked(NamedTuple):
    """One request of the workload."""

    body: dict[str, Any]
    at: float  # seconds after the start at which it is due; 0 in a closed loop


class Answer(NamedTuple):
    """What a client saw, in seconds. Open loop: counted from when the request was due, so that a
    client held up by a slow server does not hide the wait."""

    first: float  # to the first text
    last: float  # to the end of the stream
    gaps: list[float]  # between two events that carry text
    n_prompt: int
    n_output: int
    error: str | None


class Objective(NamedTuple):
    """Limits in seconds that a good answer keeps, all of them; None: no limit."""

    ttft: float | None
    itl: float | None  # the mean of an answer's gaps
    e2e: float | None

    def holds(self, answer: Answer) -> bool:
        mean = answer.last - answer.first
        mean /= max(answer.n_output - 1, 1)
        pairs = ((self.ttft, answer.first), (self.itl, mean), (self.e2e, answer.last))
        return all(limit is None or value <= limit for limit, value in pairs)


def main(argv: Sequence[str]) -> None:
    args = _options(argv)
    asked = _workload(args)
    answers, seconds = asyncio.run(_drive(args, asked))
    result = summary(answers, seconds, _objective(args))
    finish(args, "serve", _report(args, result), {**_settings(args), **result})


def _options(argv: Sequence[str]) -> argparse.Namespace:
    options = parser("serve", __doc__)
    options.add_argument("--url", default="http://127.0.0.1:8000/v1")
    options.add_argument("--model", default=None, help="default: the first that the server names")
    options.add_argument("--api-key", default=None)
    options.add_argument("--route", choices=("chat", "completions"), default="chat")
    options.add_argument("--requests", type=int, default=64)
    load = options.add_mutually_exclusive_group()
    load.add_argument("--rate", type=float, help="open loop: requests a second, Poisson arrivals")
    load.add_argument("--concurrency", type=int, default=8, help="closed loop: open requests")
    options.add_argument("--prompt-tokens", type=int, default=128, help="median, lognormal")
    options.add_argument("--output-tokens", type=int, default=64, help="median, lognormal")
    options.add_argument("--spread", type=float, default=0.5, help="sigma of both; 0: all equal")
    options.add_argument("--shared-prefix", type=int, default=0, help="tokens all prompts share")
    options.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="let answers end by themselves; else ignore_eos asks for their full length",
    )
    options.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer")
    options.add_argument("--ttft-ms", type=float, default=None, help="objective: first token")
    options.add_argument("--itl-ms", type=float, default=None, help="objective: between tokens")
    options.add_argument("--e2e-ms", type=float, default=None, help="objective: whole answer")
    args = options.parse_args(argv)
    for name in ("requests", "concurrency", "prompt_tokens", "output_tokens"):
        if getattr(args, name) < 1:
            options.error(f"--{name.replace('_', '-')} = {getattr(args, name)}, expected >= 1")
    if args.rate is not None and args.rate <= 0:
        options.error(f"--rate = {args.rate}, expected > 0")
    return args


def _workload(args: argparse.Namespace) -> list[Asked]:
    """Prose of lognormal lengths; arrivals with exponential gaps if there is a rate."""
    rng = random.Random(args.seed)
    text = resources.files("astrai.bench").joinpath("passages.txt").read_text(encoding="utf-8")
    text = " ".join(text.split())
    n = args.requests

    def lengths(median: int) -> list[int]:
        return lognormal_lengths(rng, n, np.log(median), args.spread, 1, 16 * median)

    def passage(n_tokens: int) -> str:
        size = min(n_tokens * _CHARACTERS_PER_TOKEN, len(text) - 1)
        start = rng.randrange(len(text) - size)
        return text[start : start + size]

    shared = passage(args.shared_prefix) + "\n" if args.shared_prefix else ""
    due, asked = 0.0, []
    for n_prompt, n_output in zip(lengths(args.prompt_tokens), lengths(args.output_tokens)):
        if args.rate is not None:
            due += rng.expovariate(args.rate)
        asked.append(Asked(_body(args, shared + passage(n_prompt), n_output), due))
    return asked


def _body(args: argparse.Namespace, prompt: str, max_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": args.model,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not args.stop_at_eos:
        body["ignore_eos"] = True
    if args.route == "chat":
        return body | {"messages": [{"role": "user", "content": prompt}]}
    return body | {"prompt": prompt}


async def _drive(args: argparse.Namespace, asked: list[Asked]) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first request to the last answer."""
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = args.url.rstrip("/")
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=args.timeout
    ) as client:
        if args.model is None:
            args.model = await _first_model(client)
            for request in asked:
                request.body["model"] = args.model
        path = "/chat/completions" if args.route == "chat" else "/completions"
        warm = await _ask(client, path, asked[0].body | {"max_tokens": 1}, time.perf_counter())
        if warm.error is not None:
            raise RuntimeError(f"{url}{path}: {warm.error}")
        started = time.perf_counter()

        async def one(request: Asked, due: float) -> Answer:
            return await _ask(client, path, request.body, due)

        if args.rate is not None:
            answers = await _open_loop(asked, started, one)
        else:
            answers = await _closed_loop(asked, args.concurrency, one)
        return answers, time.perf_counter() - started


async def _open_loop(
    asked: list[Asked], started: float, one: Callable[[Asked, float], Awaitable[Answer]]
) -> list[Answer]:
    """Every request leaves when it is due, whatever has become of those before."""

    async def timed(request: Asked) -> Answer:
        due = started + request.at
        await asyncio.sleep(due - time.perf_counter())
        return await one(request, due)

    return list(await asyncio.gather(*(timed(request) for request in asked)))


async def _closed_loop(
    asked: list[Asked], concurrency: int, one: Callable[[Asked, float], Awaitable[Answer]]
) -> list[Answer]:
    """`concurrency` clients, each sending its next request when its last is answered."""
    rest = iter(asked)
    answers: list[Answer] = []

    async def client() -> None:
        for request in rest:
            answers.append(await one(request, time.perf_counter()))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


async def _first_model(client: httpx.AsyncClient) -> str:
    reply = await client.get("/models")
    reply.raise_for_status()
    return str(reply.json()["data"][0]["id"])


async def _ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], due: float) -> Answer:
    first: float | None = None
    before = 0.0
    gaps: list[float] = []
    usage: dict[str, Any] = {}
    error: str | None = None
    try:
        async with client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                raw = (await reply.aread()).decode("utf-8", "replace")
                raise RuntimeError(f"HTTP {reply.status_code}: {raw[:200]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                usage = event.get("usage") or usage
                if _has_text(event):
                    now = time.perf_counter()
                    if first is None:
                        first = now
                    else:
                        gaps.append(now - before)
                    before = now
    except (httpx.HTTPError, RuntimeError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    end = time.perf_counter()
    return Answer(
        first=(end if first is None else first) - due,
        last=end - due,
        gaps=gaps,
        n_prompt=usage.get("prompt_tokens", 0),
        n_output=usage.get("completion_tokens", 0),
        error=error,
    )


def _has_text(event: dict[str, Any]) -> bool:
    for choice in event.get("choices", ()):
        delta = choice.get("delta", choice)
        if any(delta.get(name) for name in ("content", "text", "reasoning_content", "tool_calls")):
            return True
    return False


def _objective(args: argparse.Namespace) -> Objective:
    limits = (args.ttft_ms, args.itl_ms, args.e2e_ms)
    return Objective(*(None if ms is None else ms / 1e3 for ms in limits))


def summary(answers: Sequence[Answer], seconds: float, objective: Objective) -> dict[str, Any]:
    """Figures of a run; latencies in milliseconds over the answers without an error."""
    good = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    result: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "answered": len(good),
        "errors": sum(errors.values()),
        "tokens_in": sum(a.n_prompt for a in good),
        "tokens_out": sum(a.n_output for a in good),
        "tokens_per_second": round(sum(a.n_output for a in good) / seconds, 2),
        "requests_per_second": round(len(good) / seconds, 3),
        "goodput_requests_per_second": round(sum(map(objective.holds, good)) / seconds, 3),
        "ttft_ms": _percentiles([a.first for a in good]),
        "itl_ms": _percentiles([gap for a in good for gap in a.gaps]),
        "e2e_ms": _percentiles([a.last for a in good]),
    }
    if errors:
        result["first_errors"] = [f"{n} x {text}" for text, n in errors.most_common(3)]
    return result


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.percentile(seconds, _PERCENTILES) * 1e3
    return {
        "mean": round(float(np.mean(seconds)) * 1e3, 2),
        **{f"p{p}": round(float(v), 2) for p, v in zip(_PERCENTILES, values)},
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("url", "route", "requests", "rate", "prompt_tokens", "output_tokens", "spread")
    settings = {name: getattr(args, name) for name in names}
    settings["concurrency"] = None if args.rate is not None else args.concurrency
    limits = ("ttft_ms", "itl_ms", "e2e_ms")
    return settings | {"objective": {name: getattr(args, name) for name in limits}}


def _report(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    load = f"{args.rate} requests/s" if args.rate is not None else f"{args.concurrency} open"
    lines = [
        f"{args.requests} requests, {load}: {result['answered']} answered, "
        f"{result['errors']} errors, {result['seconds']:.1f} s",
        f"{result['tokens_per_second']:.1f} tok/s, {result['requests_per_second']:.2f} requests/s, "
        f"{result['goodput_requests_per_second']:.2f} within the objective",
        f"{'ms':14s}{'mean':>10s}" + "".join(f"{f'p{p}':>10s}" for p in _PERCENTILES),
    ]
    titles = {"ttft_ms": "first token", "itl_ms": "between", "e2e_ms": "whole answer"}
    for key, title in titles.items():
        lines.append(f"{title:14s}" + "".join(f"{v:10.1f}" for v in result[key].values()))
    return lines + result.get("first_errors", [])
