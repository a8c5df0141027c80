"""What the benchmarks share: options, workloads of real text, the closing JSON line."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from astrai import __version__
from astrai.front.sampling_params import SamplingParams
from astrai.inference.engine import Message

if TYPE_CHECKING:
    from astrai.front.llm import LLM, RequestOutput
    from astrai.models.tokenizer import Tokenizer


class Request(NamedTuple):
    prompt_ids: list[int]
    max_tokens: int


def parser(name: str, about: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=f"astrai bench {name}", description=about)
    options.add_argument("--json", action="store_true", help="print the JSON line only")
    options.add_argument("--seed", type=int, default=0)
    return options


def with_model(options: argparse.ArgumentParser, slots: int = 8) -> argparse.ArgumentParser:
    options.add_argument("--model", default="smollm2")
    options.add_argument(
        "--shape", help="a preset such as qwen3-0.6b, with random weights, in place of a model"
    )
    options.add_argument("--dtype", default=None)
    options.add_argument("--device", default="auto")
    options.add_argument("--load-format", default="auto")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--slots", type=int, default=slots)
    options.add_argument("--group-decode", default="length", help="length, position or off")
    return options


def load(args: argparse.Namespace, **options: Any) -> LLM:
    from astrai.front.llm import LLM

    if args.shape:
        args.model, args.load_format = args.shape, "dummy"
    chosen: dict[str, Any] = {
        "dtype": args.dtype,
        "device": args.device,
        "load_format": args.load_format,
        "threads": args.threads,
        "max_slots": args.slots,
        "group_decode": args.group_decode,
        "max_waiting": 1_000_000,
    }
    return LLM(args.model, **(chosen | options))


def text_prompt(tokenizer: Tokenizer, rng: random.Random, n: int) -> list[int]:
    """`n` tokens of public-domain prose, from a random place on."""
    text = resources.files("astrai.bench").joinpath("passages.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(" ".join(text.split()), add_special_tokens=False)
    start = rng.randrange(len(ids) - n)
    return ids[start : start + n]


def lognormal_lengths(
    rng: random.Random, n: int, mu: float, sigma: float, low: int, high: int
) -> list[int]:
    return [min(max(round(rng.lognormvariate(mu, sigma)), low), high) for _ in range(n)]


def w_cpu(tokenizer: Tokenizer, seed: int, n: int = 32) -> list[Request]:
    """W-CPU: real text, prompts 16-128 tokens, outputs lognormal(4.0, 1.0) clipped to 8-256."""
    rng = random.Random(seed)
    lengths = [rng.randint(16, 128) for _ in range(n)]
    outputs = lognormal_lengths(rng, n, 4.0, 1.0, 8, 256)
    return [Request(text_prompt(tokenizer, rng, a), b) for a, b in zip(lengths, outputs)]


def w_nano(seed: int) -> list[Request]:
    """W1: 256 prompts and outputs of uniform(100, 1024) tokens, the prompts drawn first."""
    rng = random.Random(seed)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    outputs = [rng.randint(100, 1024) for _ in prompts]
    return [Request(prompt, n) for prompt, n in zip(prompts, outputs)]


class Run(NamedTuple):
    seconds: float
    ticks: int
    outputs: list[RequestOutput]


def run(llm: LLM, requests: Sequence[Request]) -> Run:
    """All requests at once, greedy, end of sequence ignored, from an empty prefix cache."""
    llm.engine.scheduler.books.drop_cached()
    params = [
        SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
        for request in requests
    ]
    before = llm.engine.scheduler.n_tick
    started = time.perf_counter()
    outputs = llm.generate([r.prompt_ids for r in requests], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    for request, output in zip(requests, outputs):
        made = len(output.outputs[0].token_ids)
        if made != request.max_tokens:
            raise RuntimeError(f"{made} tokens made of {request.max_tokens = }")
    return Run(seconds, llm.engine.scheduler.n_tick - before, outputs)


def run_tokens(llm: LLM, requests: Sequence[Request], sampling: Mapping[str, Any]) -> Run:
    """Like `run`, of token ids alone: nothing is made into text, and there are no outputs.

    sampling: fields of SamplingParams.
    """
    llm.engine.scheduler.books.drop_cached()
    tasks = []
    for i, request in enumerate(requests):
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True, **sampling)
        tasks += llm.intake.tasks(request.prompt_ids, params, request_id=f"bench-{i}")
    before = llm.engine.scheduler.n_tick
    started = time.perf_counter()
    llm.engine.post(Message(add=tasks))
    while not llm.engine.idle:
        llm.engine.step()
    seconds = time.perf_counter() - started
    for task in tasks:
        if task.n_output != task.max_tokens:
            raise RuntimeError(f"{task.n_output} tokens made of {task.max_tokens = }: {task.error}")
    return Run(seconds, llm.engine.scheduler.n_tick - before, [])


def median(measure: Callable[[], float], times: int) -> float:
    return statistics.median(measure() for _ in range(times))


def hardware() -> str:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {torch.get_num_threads()} threads{gpu}"


def commit() -> str:
    """The commit of the checkout this runs from, or the package version."""
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or __version__


def finish(
    args: argparse.Namespace, name: str, lines: Sequence[str], result: dict[str, Any]
) -> None:
    """Print the report, then the one JSON line."""
    if not args.json:
        print("\n".join(lines))
    record = {
        "bench": name,
        "commit": commit(),
        "hardware": hardware(),
        "seed": args.seed,
        **{key: getattr(args, key) for key in ("model", "dtype", "slots") if hasattr(args, key)},
        **result,
    }
    print(json.dumps(record))
