"""Static against continuous batching: same model, same kernels, same requests.

Static takes batches of `slots` requests in order and decodes until the longest of the batch is
done; what is finished leaves the forward pass, so a static tick gets cheaper as its batch thins
out. The workload is heavy-tailed: prompts of 8-32 tokens of real text, outputs
lognormal(mu 3.5, sigma 1.2) clipped to 4-1024, `4 * slots` requests. Ticks at other widths come
from the real scheduler with a runner that computes nothing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import NamedTuple

from astrai.bench._common import (
    Request,
    finish,
    load,
    lognormal_lengths,
    parser,
    run,
    text_prompt,
    with_model,
)
from astrai.bench._floor import batch_seconds, floor_of, reached
from astrai.bench._null import simulate
from astrai.config import SchedulerConfig

WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256)
GOAL = 3.4


class Side(NamedTuple):
    """One way to batch, measured."""

    seconds: float
    ticks: int
    occupancy: float
    floor: float  # seconds of the same requests if nothing ever waited


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("batching", __doc__))
    options.add_argument("--requests", type=int, default=None, help="default: 4 per slot")
    options.add_argument("--mu", type=float, default=3.5)
    options.add_argument("--sigma", type=float, default=1.2)
    options.add_argument("--longest", type=int, default=1024)
    args = options.parse_args(argv)
    n = args.requests or 4 * args.slots
    shapes = _shapes(args.seed, n, args.mu, args.sigma, args.longest)
    static, continuous = (_measure(args, shapes, how) for how in ("static", "continuous"))
    widths = {width: _ticks_ratio(args, width) for width in WIDTHS}
    holds = next((w for w in WIDTHS if all(widths[v] >= GOAL for v in WIDTHS if v >= w)), None)
    n_out = sum(out for _, out in shapes)
    time_ratio = static.seconds / continuous.seconds
    ticks_ratio = static.ticks / continuous.ticks
    lines = _report(static, continuous, n, n_out, args.slots)
    lines += [
        f"floor {continuous.floor:.2f} s, {reached(continuous.floor, continuous.seconds)}",
        f"in time {time_ratio:.2f}x, in ticks {ticks_ratio:.2f}x at {args.slots} slots",
        "ticks static / continuous by width: "
        + ", ".join(f"{w}: {ratio:.2f}x" for w, ratio in widths.items()),
        f"{GOAL}x in ticks holds from width {holds} on" if holds else f"{GOAL}x: at no width",
    ]
    result = {
        "time_ratio": round(time_ratio, 3),
        "ticks_ratio": round(ticks_ratio, 3),
        "static": _side(static, n_out),
        "continuous": _side(continuous, n_out),
        "ticks_ratio_by_width": {str(w): round(ratio, 3) for w, ratio in widths.items()},
        "goal_holds_from_width": holds,
        "floor_seconds": round(continuous.floor, 3),
        "requests": n,
        "tokens_out": n_out,
    }
    finish(args, "batching", lines, result)


def _shapes(seed: int, n: int, mu: float, sigma: float, longest: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    outputs = lognormal_lengths(rng, n, mu, sigma, 4, longest)
    return [(rng.randint(8, 32), output) for output in outputs]


def _measure(args: argparse.Namespace, shapes: Sequence[tuple[int, int]], how: str) -> Side:
    # A pool as large as needed: two engines follow each other in this process.
    longest = max(a + b for a, b in shapes)
    kv_tokens = args.slots * (longest + 64) // 64 * 64
    llm = load(args, batching=how, prefix_cache=False, kv_tokens=kv_tokens)
    rng = random.Random(args.seed)
    requests = [Request(text_prompt(llm.tokenizer, rng, a), b) for a, b in shapes]
    # A GPU compiles kernels and captures graphs by number of rows: once through all of them.
    run(llm, requests if llm.budget.device.startswith("cuda") else requests[:2])
    busy = 0

    def count(tick: int, kind: str, values: tuple[object, ...]) -> None:
        nonlocal busy
        if kind == "tick":
            busy += values[1]  # type: ignore[operator]

    llm.events.attach(count)
    measured = run(llm, requests)
    cost, machine = floor_of(llm)
    prompts, outputs = [a for a, _ in shapes], [b for _, b in shapes]
    floor = batch_seconds(cost, machine, prompts, outputs, args.slots)
    occupancy = busy / (measured.ticks * args.slots)
    return Side(measured.seconds, measured.ticks, occupancy, floor)


def _ticks_ratio(args: argparse.Namespace, width: int) -> float:
    shapes = _shapes(args.seed, 8 * width, args.mu, args.sigma, args.longest)
    budget = 64 * width
    static = simulate(SchedulerConfig(width, budget, batching="static"), shapes)
    return static.ticks / simulate(SchedulerConfig(width, budget), shapes).ticks


def _report(static: Side, continuous: Side, n: int, n_out: int, slots: int) -> list[str]:
    best = max(static.seconds, continuous.seconds)
    lines = [f"{n} requests, {n_out} tokens out, {slots} slots"]
    for name, side in (("Static", static), ("Continuous", continuous)):
        ratio = static.seconds / side.seconds
        bar = "▇" * round(3 * best / side.seconds)
        lines.append(
            f"{name:<10} {ratio:4.1f}x {bar}  {n_out / side.seconds:.0f} tok/s, "
            f"{side.ticks} ticks, {side.occupancy:.0%} of slots in use"
        )
    return lines


def _side(side: Side, n_out: int) -> dict[str, float]:
    return {
        "seconds": round(side.seconds, 3),
        "tokens_per_second": round(n_out / side.seconds, 2),
        "ticks": side.ticks,
        "occupancy": round(side.occupancy, 4),
    }
