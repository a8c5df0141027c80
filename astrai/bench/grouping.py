"""What grouping the decode steps gives where attention is matmuls (backend `cpu`): W-CPU, and one
workload with every task at the same position.

Rounds run every kind of grouping once, in turn; the medians of the ratios to `off` count.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from astrai.bench._common import Request, finish, load, parser, run, text_prompt, w_cpu, with_model

KINDS = ("off", "position", "length")


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("grouping", __doc__))
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args(argv)
    engines = {
        kind: load(args, attention="cpu", group_decode=kind, prefix_cache=False) for kind in KINDS
    }
    tokenizer = engines["off"].tokenizer
    rng = random.Random(args.seed)
    workloads = {
        "W-CPU": w_cpu(tokenizer, args.seed),
        "same position": [Request(text_prompt(tokenizer, rng, 64), 64) for _ in range(args.slots)],
    }
    lines, result = [], {}
    for name, requests in workloads.items():
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            run(engines[kind], requests[:2])
        for _ in range(args.rounds):
            for kind in KINDS:
                seconds[kind].append(run(engines[kind], requests).seconds)
        n_out = sum(request.max_tokens for request in requests)
        ratios = {
            kind: statistics.median(a / b for a, b in zip(seconds["off"], times))
            for kind, times in seconds.items()
        }
        for kind, times in seconds.items():
            rate = n_out / statistics.median(times)
            lines.append(f"{name:<14} {kind:<9} {rate:7.1f} tok/s  {ratios[kind]:.2f}x")
        result[name] = {kind: round(ratio, 3) for kind, ratio in ratios.items()}
    finish(args, "grouping", lines, {"ratio_to_off": result})
