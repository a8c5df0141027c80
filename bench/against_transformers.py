"""W-CPU and one stream, side by side in one run: this engine against `transformers` in bfloat16.

    python bench/against_transformers.py [--rounds 3] [--parts static,continuous,stream]

Each round runs every engine once, in turn and in a process of its own, so that a drift of the
machine's speed hits all of them; the medians of the ratios count. `transformers` gets its own
reading of the same GGUF file, greedy decoding, end of sequence ignored, and the same requests:
  static      `generate` on left-padded batches of 8 in order, each until its longest is done;
  continuous  its continuous batching, at most 8 requests running;
  stream      `generate` on one prompt of 32 tokens, (time of 65 tokens - time of 1) / 64.
Only requested tokens count on either side. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from astrai import LLM
from astrai.bench._common import Request, commit, hardware, run, text_prompt, w_cpu
from astrai.models.pull import resolve

STREAM_TOKENS = 64


class Theirs:
    """`transformers` on the same weights."""

    def __init__(self, gguf: Path, dtype: torch.dtype, slots: int) -> None:
        self.slots = slots
        fields = load_gguf_checkpoint(str(gguf))["config"]
        config = LlamaConfig(**{k: v for k, v in fields.items() if k[0] != "_"})
        self.model: Any = LlamaForCausalLM(config).eval()
        read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=self.model)
        self.model.load_state_dict(read["tensors"], strict=False)
        self.model.to(dtype)
        # Its reading of the file's end of sequence must not end anything here.
        self.model.generation_config.eos_token_id = None
        self.model.config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> Any:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        made = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        if made.shape[1] != longest + n:
            raise RuntimeError(f"{made.shape[1] - longest} tokens made, expected {n}")
        return made

    def static(self, requests: Sequence[Request]) -> float:
        started = time.perf_counter()
        for i in range(0, len(requests), self.slots):
            batch = requests[i : i + self.slots]
            self.generate([r.prompt_ids for r in batch], max(r.max_tokens for r in batch))
        return time.perf_counter() - started

    def continuous(self, requests: Sequence[Request]) -> float:
        """Time from the first request to the last result; its start-up and warm-up are left out."""
        config = ContinuousBatchingConfig(
            max_requests_per_batch=self.slots, max_batch_tokens=512, num_blocks=64
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=256)
        expected = {}
        with self.model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config
        ) as manager:
            started = time.perf_counter()
            for r in requests:
                name = manager.add_request(
                    r.prompt_ids, max_new_tokens=r.max_tokens, eos_token_id=-1
                )
                expected[name] = r.max_tokens
            while expected:
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError(f"no result within 60 s, {len(expected)} missing")
                if not result.is_finished():
                    continue
                wanted = expected.pop(result.request_id)
                if len(result.generated_tokens) != wanted:
                    raise RuntimeError(f"{len(result.generated_tokens)} tokens, expected {wanted}")
            return time.perf_counter() - started

    def stream(self, prompt: Sequence[int]) -> float:
        started = time.perf_counter()
        self.generate([prompt], 1)
        first = time.perf_counter() - started
        started = time.perf_counter()
        self.generate([prompt], 1 + STREAM_TOKENS)
        return (time.perf_counter() - started - first) / STREAM_TOKENS


def ours_stream(llm: LLM, prompt: list[int]) -> float:
    first = run(llm, [Request(prompt, 1)]).seconds
    return (run(llm, [Request(prompt, 1 + STREAM_TOKENS)]).seconds - first) / STREAM_TOKENS


def measure(args: argparse.Namespace) -> float:
    """Seconds of one engine on its workload, loaded and warmed up before the clock starts."""
    ours = args.only.startswith("ours")
    llm = LLM("smollm2", dtype=args.dtype, max_slots=args.slots)
    requests = w_cpu(llm.tokenizer, args.seed, args.requests)
    prompt = text_prompt(llm.tokenizer, random.Random(args.seed), 32)
    if ours:
        run(llm, requests[:2])
        return (
            ours_stream(llm, prompt) if args.only == "ours_stream" else run(llm, requests).seconds
        )
    del llm
    theirs = Theirs(resolve("smollm2"), torch.bfloat16, args.slots)
    theirs.generate([prompt], 4)
    if args.only == "stream":
        return theirs.stream(prompt)
    if args.only == "static":
        return theirs.static(requests)
    theirs.continuous(requests[:2])
    return theirs.continuous(requests)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--dtype", default=None, help="of this engine; None: its default")
    options.add_argument("--parts", default="static,continuous,stream")
    options.add_argument("--only", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return
    parts = ["ours", "static", "continuous", "ours_stream", "stream"]
    wanted = [name for name in parts if name.startswith("ours") or name in args.parts.split(",")]
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    for i in range(args.rounds):
        for name in wanted:
            child = [sys.executable, *sys.argv, "--only", name]
            printed = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds[name].append(json.loads(printed.splitlines()[-1]))
        print(f"round {i + 1}: " + ", ".join(f"{n} {v[-1]:.3f} s" for n, v in seconds.items()))
    llm = LLM("smollm2", max_slots=args.slots)
    report(args, seconds, sum(r.max_tokens for r in w_cpu(llm.tokenizer, args.seed, args.requests)))


def report(args: argparse.Namespace, seconds: dict[str, list[float]], n_out: int) -> None:
    result: dict[str, Any] = {}
    for name, times in seconds.items():
        tokens = 1 if name.endswith("stream") else n_out
        ours = seconds["ours_stream" if name.endswith("stream") else "ours"]
        ratio = statistics.median(a / b for a, b in zip(times, ours))
        rate = tokens / statistics.median(times)
        print(f"{name:<12} {rate:8.1f} tok/s   ours is {ratio:.2f}x")
        result[name] = {"tokens_per_second": round(rate, 2), "ours_ratio": round(ratio, 3)}
    record = {
        "bench": "against_transformers",
        "commit": commit(),
        "hardware": hardware(),
        "seed": args.seed,
        "requests": args.requests,
        "slots": args.slots,
        "dtype": args.dtype,
        "tokens_out": n_out,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **result,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
