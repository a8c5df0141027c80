"""Time to first token with and without a prefix that the cache already holds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from astrai.bench._common import Request, finish, load, parser, run, text_prompt, with_model
from astrai.bench._floor import first_token_seconds, floor_of, reached
from astrai.front.sampling_params import SamplingParams


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("prefix", __doc__))
    options.add_argument("--shared-tokens", type=int, default=512)
    options.add_argument("--own-tokens", type=int, default=32)
    options.add_argument("--repeat", type=int, default=7)
    args = options.parse_args(argv)
    llm = load(args)
    rng = random.Random(args.seed)
    shared = text_prompt(llm.tokenizer, rng, args.shared_tokens)
    one = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def prompt() -> list[int]:
        return shared + text_prompt(llm.tokenizer, rng, args.own_tokens)

    for _ in range(2):  # a prompt that is computed, and one that is found
        llm.generate([prompt()], one, use_tqdm=False)
    run(llm, [Request(prompt(), 1)])
    outputs = [run(llm, [Request(prompt(), 1)]).outputs[0] for _ in range(args.repeat)]
    cold = [output.times.to_first_token * 1e3 for output in outputs]
    warm, cached = [], []
    for _ in range(args.repeat):  # the cache now holds what the last cold run left
        output = llm.generate([prompt()], one, use_tqdm=False)[0]
        cached.append(output.num_cached_tokens)
        warm.append(output.times.to_first_token * 1e3)
    without, found = statistics.median(cold), statistics.median(warm)
    cost, machine = floor_of(llm)
    n = args.shared_tokens + args.own_tokens
    floors = [first_token_seconds(cost, machine, n, held) * 1e3 for held in (0, min(cached))]
    lines = [
        f"{args.shared_tokens} shared tokens + {args.own_tokens} own, time to first token",
        f"not cached {without:.2f} ms  (floor {floors[0]:.2f} ms, {reached(floors[0], without)})",
        f"cached     {found:.2f} ms  (floor {floors[1]:.2f} ms, {reached(floors[1], found)}; "
        f"{min(cached)} tokens found)",
    ]
    result = {
        "cold_ms": round(without, 2),
        "warm_ms": round(found, 2),
        "floor_cold_ms": round(floors[0], 3),
        "floor_warm_ms": round(floors[1], 3),
        "ratio": round(without / found, 2),
        "cached_tokens": min(cached),
    }
    finish(args, "prefix", lines, result)
