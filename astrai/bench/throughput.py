"""Offline tokens per second on a fixed workload."""

from __future__ import annotations

from collections.abc import Sequence

from astrai.bench._common import finish, load, parser, run, w_cpu, with_model


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("throughput", __doc__))
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts")
    args = options.parse_args(argv)
    llm = load(args)
    requests = w_cpu(llm.tokenizer, args.seed, args.requests)
    run(llm, w_cpu(llm.tokenizer, args.seed + 1, 4))  # warm-up on other prompts
    runs = sorted((run(llm, requests) for _ in range(args.repeat)), key=lambda r: r.seconds)
    middle = runs[len(runs) // 2]
    n_in = sum(len(r.prompt_ids) for r in requests)
    n_out = sum(r.max_tokens for r in requests)
    rate = n_out / middle.seconds
    spread = [round(n_out / r.seconds, 1) for r in runs]
    lines = [
        f"W-CPU: {len(requests)} requests, {n_in} tokens in, {n_out} out, {args.slots} running",
        f"{rate:.1f} tok/s  ({middle.seconds:.2f} s, {middle.ticks} ticks; runs {spread})",
    ]
    result = {
        "tokens_per_second": round(rate, 2),
        "runs_tokens_per_second": spread,
        "seconds": round(middle.seconds, 3),
        "ticks": middle.ticks,
        "tokens_in": n_in,
        "tokens_out": n_out,
    }
    finish(args, "throughput", lines, result)
