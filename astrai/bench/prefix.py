"""Time to first token with and without a prefix that the cache already holds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from astrai.bench._common import Request, finish, load, parser, run, text_prompt, with_model
from astrai.inference.llm import RequestTimes
from astrai.inference.sampling_params import SamplingParams


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

    run(llm, [Request(prompt(), 1)])
    cold = [run(llm, [Request(prompt(), 1)]).seconds * 1e3 for _ in range(args.repeat)]
    warm, cached = [], []
    for _ in range(args.repeat):  # the cache now holds what the last cold run left
        output = llm.generate([prompt()], one, use_tqdm=False)[0]
        cached.append(output.num_cached_tokens)
        warm.append(_wait(output.times) * 1e3)
    lines = [
        f"{args.shared_tokens} shared tokens + {args.own_tokens} own, time to first token",
        f"not cached {statistics.median(cold):.1f} ms",
        f"cached     {statistics.median(warm):.1f} ms  ({min(cached)} tokens found)",
    ]
    result = {
        "cold_ms": round(statistics.median(cold), 2),
        "warm_ms": round(statistics.median(warm), 2),
        "ratio": round(statistics.median(cold) / statistics.median(warm), 2),
        "cached_tokens": min(cached),
    }
    finish(args, "prefix", lines, result)


def _wait(times: RequestTimes) -> float:
    if times.first_token is None:
        raise RuntimeError("the request has no first token")
    return times.first_token - times.arrived
