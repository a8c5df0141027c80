"""What a grammar costs: the constrained rows' masks, and what their neighbours notice of them."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from astrai.bench._common import finish, load, parser, text_prompt, with_model
from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput

if TYPE_CHECKING:
    from astrai.front.llm import LLM
    from astrai.inference.grammar import Grammars

_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
# Never complete within the tokens of a run.
_PEOPLE = StructuredOutput(
    json_schema=json.dumps({"type": "array", "items": _PERSON, "minItems": 1000})
)
_KINDS = {
    "people": _PEOPLE,
    "json_object": StructuredOutput(json_object=True),
    "regex": StructuredOutput(regex=r"(\d{3}-){2}\d{4}( [A-Z][a-z]+){1,9}"),
    "choice": StructuredOutput(choice=("positive", "negative", "neutral")),
    "ebnf": StructuredOutput(grammar='root ::= ("(" root ")" | [a-z]+ | [0-9]+) (" + " root)?'),
}


class Cost(NamedTuple):
    """Microseconds on this host."""

    compile: float
    mask_mean: float
    mask_p99: float
    advance: float
    n: int  # masks measured


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("structured", __doc__))
    options.add_argument("--tokens", type=int, default=96, help="output tokens of each request")
    options.add_argument("--repeat", type=int, default=9, help="paired runs")
    args = options.parse_args(argv)
    llm = load(args)
    if llm.engine.grammars is None:
        raise RuntimeError("the engine has no compiler of grammars")
    costs = {kind: _cost(llm.engine.grammars, asked, args.seed) for kind, asked in _KINDS.items()}
    neighbours = _neighbours(llm, args)
    lines = [
        f"{'grammar':12} {'compile':>10} {'mask':>9} {'p99':>9} {'advance':>9}   (µs)",
        *(
            f"{kind:12} {c.compile:10.0f} {c.mask_mean:9.1f} {c.mask_p99:9.1f} {c.advance:9.1f}"
            for kind, c in costs.items()
        ),
        f"tokens/s of {args.slots // 2} plain requests beside as many others",
        f"others plain       {neighbours['plain_tokens_per_second']:.1f}",
        f"others constrained {neighbours['constrained_tokens_per_second']:.1f}",
        f"ratio, median of {args.repeat} pairs: {neighbours['ratio']:.4f} "
        f"(of processor time: {neighbours['cpu_ratio']:.4f})",
    ]
    result: dict[str, Any] = {f"{kind}_mask_us": round(c.mask_mean, 2) for kind, c in costs.items()}
    result["mask_us_p99"] = round(max(cost.mask_p99 for cost in costs.values()), 1)
    finish(args, "structured", lines, result | neighbours)


def _cost(grammars: Grammars, asked: StructuredOutput, seed: int, n: int = 600) -> Cost:
    """Random walks through a grammar, from its start again when it ends."""
    rng = random.Random(seed)
    began = time.perf_counter()
    grammars.wait(asked)
    compiled = time.perf_counter() - began
    masks: list[float] = []
    advances: list[float] = []
    matcher = None
    while len(masks) < n:
        matcher = matcher or grammars.matcher(asked)
        if matcher is None:
            raise RuntimeError("the grammar was dropped while it was measured")
        began = time.perf_counter()
        mask = matcher.mask()
        masks.append(time.perf_counter() - began)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        began = time.perf_counter()
        ended = matcher.advance(token)
        advances.append(time.perf_counter() - began)
        matcher = None if ended else matcher
    p99 = float(np.percentile(masks, 99))
    micro = 1e6
    return Cost(
        compiled * micro, statistics.mean(masks) * micro, p99 * micro,
        statistics.mean(advances) * micro, n,
    )  # fmt: skip


def _neighbours(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """The same plain requests, beside rows without and with a grammar, turn by turn."""
    rng = random.Random(args.seed)
    prompts = [text_prompt(llm.tokenizer, rng, 32) for _ in range(args.slots)]
    n_plain = args.slots // 2
    rates: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    for i in range(args.repeat + 1):
        for constrained in (False, True) if i % 2 else (True, False):
            worked = time.process_time()
            seconds = _run(llm, prompts, n_plain, args.tokens, _PEOPLE if constrained else None)
            if i:  # the first pair warms up
                rates[constrained].append(n_plain * args.tokens / seconds)
                cpu[constrained].append(time.process_time() - worked)
    ratios = [b / a for a, b in zip(rates[False], rates[True])]
    cpu_ratios = [a / b for a, b in zip(cpu[False], cpu[True])]
    return {
        "plain_tokens_per_second": round(statistics.median(rates[False]), 1),
        "constrained_tokens_per_second": round(statistics.median(rates[True]), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_low": round(min(ratios), 4),
        "ratio_high": round(max(ratios), 4),
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
    }


def _run(
    llm: LLM, prompts: list[list[int]], n_plain: int, n: int, asked: StructuredOutput | None
) -> float:
    """Seconds until the last of the first `n_plain` requests has its n tokens."""
    llm.engine.scheduler.books.drop_cached()
    plain = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
    other = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, structured=asked)
    params = [plain if i < n_plain else other for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    short = [len(o.outputs[0].token_ids) for o in outputs if len(o.outputs[0].token_ids) != n]
    if short:
        raise RuntimeError(f"{short[0]} tokens made, expected {n}")
    ends = [output.times.ended for output in outputs[:n_plain]]
    return max(end for end in ends if end is not None) - outputs[0].times.arrived
