"""Offline tokens per second on a fixed workload, beside the floor of this machine.

cpu: 32 requests of real text, prompts 16-128 tokens, outputs lognormal, 8 running, greedy.
nano: 256 requests at once, prompts and outputs of uniform(100, 1024) tokens, at most 256 running,
temperature 0.6, tokens only; `--sampling '{"temperature": 0.7, "top_p": 0.8}'` for other draws.
Both ignore end of sequence; a warm-up on other prompts goes before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from astrai.bench._common import (
    Request,
    Run,
    finish,
    load,
    parser,
    run,
    run_tokens,
    w_cpu,
    w_nano,
    with_model,
)
from astrai.bench._floor import batch_seconds, floor_of, reached

if TYPE_CHECKING:
    from astrai.front.llm import LLM

NAMES = {"cpu": "W-CPU", "nano": "W1"}


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("throughput", __doc__), slots=0)
    options.add_argument("--workload", choices=NAMES, default="cpu")
    options.add_argument("--requests", type=int, default=None, help="the first so many")
    options.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts")
    options.add_argument("--sampling", default='{"temperature": 0.6}', help="nano only: JSON")
    args = options.parse_args(argv)
    args.sampling = json.loads(args.sampling)
    args.slots = args.slots or (256 if args.workload == "nano" else 8)
    llm = load(args)
    requests = _requests(llm, args, args.seed)
    # As many other requests where kernels are compiled and graphs captured by number of rows.
    on_gpu = llm.budget.device.startswith("cuda")
    _run(llm, _requests(llm, args, args.seed + 1)[: None if on_gpu else 4], args)
    runs = [_run(llm, requests, args) for _ in range(args.repeat)]
    seconds = statistics.median(r.seconds for r in runs)
    n_in, n_out = sum(len(r.prompt_ids) for r in requests), sum(r.max_tokens for r in requests)
    cost, machine = floor_of(llm)
    lengths = [len(r.prompt_ids) for r in requests], [r.max_tokens for r in requests]
    floor = batch_seconds(cost, machine, *lengths, args.slots)
    rate, spread = n_out / seconds, [round(n_out / r.seconds, 1) for r in runs]
    name, ticks = NAMES[args.workload], runs[0].ticks
    lines = [
        f"{name}: {len(requests)} requests, {n_in} tokens in, {n_out} out, {args.slots} running",
        f"{rate:.1f} tok/s  ({seconds:.2f} s, {ticks} ticks; runs {spread})",
        f"floor {floor:.2f} s ({machine.bandwidth / 1e9:.0f} GB/s), {reached(floor, seconds)}",
    ]
    result = {
        "workload": args.workload,
        **({"sampling": args.sampling} if args.workload == "nano" else {}),
        "tokens_per_second": round(rate, 2),
        "runs_tokens_per_second": spread,
        "seconds": round(seconds, 3),
        "floor_seconds": round(floor, 3),
        "ticks": ticks,
        "tokens_in": n_in,
        "tokens_out": n_out,
    }
    finish(args, "throughput", lines, result)


def _requests(llm: LLM, args: argparse.Namespace, seed: int) -> list[Request]:
    if args.workload == "nano":
        return w_nano(seed)[: args.requests]
    return w_cpu(llm.tokenizer, seed, args.requests or 32)


def _run(llm: LLM, requests: Sequence[Request], args: argparse.Namespace) -> Run:
    if args.workload == "nano":
        return run_tokens(llm, requests, args.sampling)
    return run(llm, requests)
