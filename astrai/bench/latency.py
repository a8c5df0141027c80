"""One stream alone: milliseconds per token and to the first token, beside their floors."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from astrai.bench._common import Request, finish, load, parser, run, text_prompt, with_model
from astrai.bench._floor import first_token_seconds, floor_of, reached


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("latency", __doc__))
    options.add_argument("--prompt-tokens", type=int, default=32)
    options.add_argument("--output-tokens", type=int, default=129)
    options.add_argument("--repeat", type=int, default=5)
    args = options.parse_args(argv)
    llm = load(args)
    rng = random.Random(args.seed)
    run(llm, [Request(text_prompt(llm.tokenizer, rng, args.prompt_tokens), 16)])
    first, each = [], []
    for _ in range(args.repeat):
        prompt = text_prompt(llm.tokenizer, rng, args.prompt_tokens)
        times = run(llm, [Request(prompt, args.output_tokens)]).outputs[0].times
        first.append(times.to_first_token * 1e3)
        each.append(times.after_first_token / (args.output_tokens - 1) * 1e3)
    ttft, ms = statistics.median(first), statistics.median(each)
    cost, machine = floor_of(llm)
    context = args.prompt_tokens + args.output_tokens / 2
    floor_ms = cost.decode_bytes(context) / machine.bandwidth * 1e3
    floor_first = first_token_seconds(cost, machine, args.prompt_tokens) * 1e3
    lines = [
        f"one stream, {args.prompt_tokens} tokens in, {args.output_tokens} out",
        f"first token {ttft:.2f} ms, then {ms:.3f} ms per token ({1e3 / ms:.1f} tok/s)",
        f"floors {floor_first:.2f} ms, {reached(floor_first, ttft)}; {floor_ms:.3f} ms, "
        f"{reached(floor_ms, ms)} ({machine.bandwidth / 1e9:.0f} GB/s)",
    ]
    result = {
        "first_token_ms": round(ttft, 2),
        "ms_per_token": round(ms, 3),
        "floor_first_token_ms": round(floor_first, 3),
        "floor_ms_per_token": round(floor_ms, 3),
        "tokens_per_second": round(1e3 / ms, 2),
        "runs_ms_per_token": [round(value, 3) for value in each],
    }
    finish(args, "latency", lines, result)
