"""Makes the recordings beside this file anew: python -m tests.recordings.make [NAME ...]

They hold today's scheduling fast. Make one anew only when a decision was meant to change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.observe.test_replay import mixed_run

HERE = Path(__file__).parent


def plain(path: Path) -> None:
    mixed_run(path, 42)


def overlap(path: Path) -> None:
    mixed_run(path, 43, depth=1, group_decode="off")


def static(path: Path) -> None:
    mixed_run(path, 44, batching="static", prefix_cache=False)


def priority(path: Path) -> None:
    mixed_run(path, 45, ageing_ticks=5, group_decode="position")


def smollm2(path: Path) -> None:
    """The default model in a pool that is too small: real text, prefixes, choices, a schema."""
    from astrai import LLM, SamplingParams, StructuredOutput

    llm = LLM("smollm2", record=str(path), max_slots=4, page_size=16, kv_tokens=128)
    shared = "You are a helpful assistant who answers in short and simple words. "
    questions = ["What is a page?", "Name three colours.", "Say hello.", "Count to five.", "Why?"]
    greedy = [SamplingParams(temperature=0.0, max_tokens=20 + 7 * i) for i in range(5)]
    llm.generate([shared + question for question in questions], greedy, use_tqdm=False)
    params = [
        SamplingParams(n=3, seed=1, max_tokens=24),
        SamplingParams(stop=["."], max_tokens=30, temperature=0.0),
        SamplingParams(structured=StructuredOutput(choice=("red", "green")), max_tokens=8),
        SamplingParams(prompt_logprobs=1, max_tokens=4),
        SamplingParams(max_tokens=0, pooling="mean"),
    ]
    llm.generate([shared + question for question in reversed(questions)], params, use_tqdm=False)


MAKERS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (plain, overlap, static, priority, smollm2)
}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        path = HERE / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        MAKERS[name](path)
