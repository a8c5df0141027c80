"""Constrained rows on the GPU path, through Triton's interpreter, against the plain runner."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.task import Task
from astrai.models.decoder import Decoder
from tests.runtime.gpu.test_runner import check_same, decoder, run

__all__ = ["decoder"]  # a fixture

EOS = 257


class Ascending:
    """In place of a grammar: each token in the 40 after the one before, at most seven, then EOS."""

    eos_ids = (EOS,)

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self, held_off: Collection[int] = ()) -> np.ndarray:
        last = self.taken[-1] if self.taken else 0
        allowed = np.zeros(320, dtype=bool)
        allowed[[EOS] if len(self.taken) == 7 else range(last + 1, last + 41)] = True
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def advance(self, token: int) -> bool:
        last = self.taken[-1] if self.taken else 0
        assert token == EOS if len(self.taken) == 7 else last < token <= last + 40
        self.taken.append(token)
        return token == EOS


def tasks() -> list[Task]:
    """Constrained and not, greedy and drawn, in turn."""
    made = []
    for i in range(6):
        asked = StructuredOutput(regex="ascending") if i % 2 else None
        params = SamplingParams(
            max_tokens=12, structured=asked, temperature=0.0 if i == 3 else 1.0,
            logprobs=1 if i == 5 else None,
        )  # fmt: skip
        task = Task(i, str(i), [i + 1] * (9 + i), params, 12, seed=i, stop_ids=frozenset([EOS]))
        matcher: Any = Ascending() if i % 2 else None
        task.matcher = matcher
        made.append(task)
    return made


@pytest.mark.parametrize("n_pages", [40, 4])
def test_same_tokens_as_the_plain_runner(decoder: Decoder, n_pages: int) -> None:
    """One launch is unread when the next is planned; with few pages, tasks are preempted."""
    expected, *_ = run(decoder, "plain", 40, tasks())
    found, scheduler, _ = run(decoder, "gpu", n_pages, tasks())
    check_same(expected, found)
    assert n_pages == 40 or scheduler.n_preemptions > 0
    assert [task.finish_reason for task in found[1::2]] == ["stop"] * 3
    assert all(task.n_output == 8 for task in found[1::2])
