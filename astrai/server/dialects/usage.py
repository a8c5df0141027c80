"""What a request used: tokens, and where its time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta

Json = dict[str, Any]


@dataclass(slots=True)
class UsageSum:
    """Of all choices of all prompts. A prompt counts once, however many choices it has; of times,
    which run side by side, the longest counts."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    queued: float | None = None  # seconds; None: no choice got that far
    prefill: float | None = None
    decode: float | None = None
    preemptions: int = 0
    waits: Counter[str] = field(default_factory=Counter)  # reason → ticks

    def add(self, delta: StreamDelta) -> None:
        if (usage := delta.usage) is None:
            return
        self.completion += usage.completion_tokens
        if delta.index == 0:
            self.prompt += usage.prompt_tokens
            self.cached += usage.cached_tokens
        times = usage.timings
        self.queued = _longest(self.queued, times.queued)
        self.prefill = _longest(self.prefill, times.prefill)
        self.decode = _longest(self.decode, times.decode)
        self.preemptions += times.n_preempted
        self.waits.update(times.waits)

    def body(self) -> Json:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def timings(self) -> Json:
        """`timings`, which stands beside `usage` in every answer."""
        return {
            "queued_ms": _ms(self.queued),
            "prefill_ms": _ms(self.prefill),
            "decode_ms": _ms(self.decode),
            "computed_tokens": self.prompt - self.cached,
            "cached_tokens": self.cached,
            "preemptions": self.preemptions,
            "waits": dict(self.waits),
        }


def _longest(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
