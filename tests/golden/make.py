"""What this machine's CPU answered before a change, to be compared bit for bit after it.

    python -m tests.golden.make FILE          write the answers of the tree as it is
    python -m tests.golden.make FILE --check  exit code 1 if they are others

Tokens, texts, finish and stop reasons and the exact bits of log-probabilities of SmolLM2 in three
precisions and of tiny models of every family, with all kinds of sampling parameters, one request
at a time and all together in a pool that is too small. Each run is kept as a digest of all that.
Other processors may round otherwise, so a file is good for the kind of machine that wrote it, which
it names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astrai import LLM, SamplingParams, StructuredOutput
from astrai.bench._common import hardware, text_prompt
from tests.models.tiny import FAMILIES, save

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 2},
    {"temperature": 1.3, "min_p": 0.05, "seed": 3, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 0},
    {"temperature": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.3, "seed": 4},
    {"temperature": 0.6, "n": 3, "seed": 5},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 6},
    {"temperature": 0.0, "stop": [" the", "\n"], "min_tokens": 3},
    {"temperature": 0.5, "bad_words": ["and", "of"], "seed": 6},
    {"temperature": 0.8, "seed": 7, "stop": ["e"], "include_stop_str_in_output": True},
    {"temperature": 0.0, "max_tokens": 0, "pooling": "mean"},
]


def params_of(structured: bool) -> Iterator[SamplingParams]:
    for i, kind in enumerate(KINDS):
        yield SamplingParams(**{"max_tokens": 12 + 3 * i, "ignore_eos": i % 3 == 0, **kind})
    if structured:
        for asked in (
            {"json_schema": SCHEMA},
            {"regex": "[a-f]{4,9}[0-9]"},
            {"choice": ("red", "blue")},
        ):
            yield SamplingParams(
                temperature=0.7, seed=8, max_tokens=40, structured=StructuredOutput(**asked)
            )


def answers(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    return [
        [
            [
                output.text,
                output.token_ids,
                output.finish_reason,
                output.stop_reason,
                output.error,
                _bits(output.logprobs),
                None if output.pooled is None else [value.hex() for value in output.pooled],
            ]
            for output in request.outputs
        ]
        + [_bits(request.prompt_logprobs)]
        for request in llm.generate(prompts, params, use_tqdm=False)
    ]


def _bits(logprobs: Any) -> Any:
    if logprobs is None:
        return None
    return [
        None if one is None else [[t, s.logprob.hex(), s.rank] for t, s in one.items()]
        for one in logprobs
    ]


def runs(model: str, structured: bool, **options: Any) -> Iterator[Any]:
    rng = random.Random(11)
    params = list(params_of(structured))
    llm = LLM(model, max_slots=4, **options)
    if structured:
        prompts = [text_prompt(llm.tokenizer, rng, rng.randint(3, 90)) for _ in params]
    else:
        prompts = [[rng.randrange(256) for _ in range(rng.randint(3, 90))] for _ in params]
    prompts[4] = prompts[1] + prompts[4]
    for prompt, one in zip(prompts, params):
        llm.engine.scheduler.books.drop_cached()
        yield answers(llm, [prompt], [one])
    small = LLM(model, max_slots=5, page_size=16, kv_tokens=320, prefill_budget=37, **options)
    yield answers(small, prompts, params)
    yield answers(small, prompts[::-1], params[::-1])


def everything() -> Iterator[tuple[str, list[str]]]:
    """Name of a model and precision → a digest of each of its runs."""
    for dtype in ("int4", "bfloat16", "float32"):
        yield f"smollm2 {dtype}", _digests(runs("smollm2", True, dtype=dtype))
    for attention in ("cpu", "reference"):
        yield f"smollm2 {attention}", _digests(runs("smollm2", True, attention=attention))
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            save(family, Path(folder))
            for dtype in ("bfloat16", "float32"):
                yield f"tiny {family} {dtype}", _digests(runs(folder, False, dtype=dtype))


def _digests(answers: Iterator[Any]) -> list[str]:
    return [hashlib.sha256(json.dumps(one).encode()).hexdigest()[:16] for one in answers]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("--check", action="store_true")
    args = options.parse_args()
    if not args.check:
        said = {"hardware": hardware(), "answers": dict(everything())}
        args.file.write_text(json.dumps(said, indent=1) + "\n")
        return 0
    known = json.loads(args.file.read_text())
    if known["hardware"] != hardware():
        print(f"written on {known['hardware']}, this is {hardware()}")
    different = 0
    for name, got in everything():
        places = [i for i, (a, b) in enumerate(zip(known["answers"][name], got)) if a != b]
        different += len(places)
        print(f"{name}: {len(got)} runs, {len(places)} differ {places[:5]}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
