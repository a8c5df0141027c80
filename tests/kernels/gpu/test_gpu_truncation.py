"""top_k, top_p and min_p inside the launch, through Triton's interpreter, against the sampler."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.front.sampling_params import SamplingParams
from astrai.inference.task import Task
from astrai.kernels.gpu.sampling.sampling import SamplingScratch, sample
from astrai.kernels.gpu.sampling.truncation import TruncationScratch
from astrai.runtime.gpu.uploads import SlotState
from astrai.runtime.sampling.sampler import Sampler, SampleRow

CPU = torch.device("cpu")


def draw(logits: Tensor, asked: list[SamplingParams], room: int, rank: int) -> list[int]:
    """The kernels' tokens, for rows at positions 0, 1, 2, ... of slots in reverse."""
    n, vocab = logits.shape
    state = SlotState(n, 1, CPU)
    slots = torch.arange(n - 1, -1, -1, dtype=torch.int32)
    for i, params in enumerate(asked):
        task = Task(i, str(i), [0], params, 1, seed=i * 77)
        task.slot = n - 1 - i
        state.follow(task, 0)
    for place, value in state.take_changes().tolist():
        state.arena[place] = value
    scratch = SamplingScratch(vocab, n, CPU)
    scratch.truncation = TruncationScratch(scratch.n_chunks, n, CPU, room, rank)
    tokens, tops = torch.empty(n, dtype=torch.int32), torch.empty(n)
    sample(
        scratch, logits, state.temperatures, state.seeds, slots,
        torch.arange(n, dtype=torch.int32), state.last, tokens, tops, state.limits,
    )  # fmt: skip
    return tokens.tolist()


def expected(logits: Tensor, asked: list[SamplingParams]) -> list[int]:
    n, vocab = logits.shape
    rows = [SampleRow(p, i * 77, i + 1, n - 1 - i, [], []) for i, p in enumerate(asked)]
    return [drawn.token for drawn in Sampler(vocab, n, "cpu").sample(logits.float(), rows)]


def some_params(rng: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 1e-30, 1e-3, 0.05, 0.3, 0.7, 1.0, 1.0, 2.5, 30.0, 1e30]),
        top_k=rng.choice([0, 0, 1, 2, 17, vocab // 2, vocab - 1, vocab, vocab + 9, 1 << 40]),
        top_p=rng.choice([1.0, 1.0, 1e-30, 1e-6, 0.3, 0.9, 0.999999]),
        min_p=rng.choice([0.0, 0.0, 1e-20, 0.02, 0.5, 1.0]),
    )


@pytest.mark.parametrize(
    ("vocab", "room", "rank"), [(5003, 1024, 64), (5003, 32, 24), (2048, 4096, 1536), (70, 64, 64)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_what_the_general_sampler_draws(
    vocab: int, room: int, rank: int, dtype: torch.dtype
) -> None:
    """Few candidates, or so many that the whole row is searched."""
    rng = random.Random(vocab + room)
    torch.manual_seed(room)
    n = 20
    spread = torch.tensor([rng.choice([0.01, 0.5, 3.0, 12.0]) for _ in range(n)])
    logits = (torch.randn(n, vocab) * spread[:, None]).to(dtype)
    asked = [some_params(rng, vocab) for _ in range(n)]
    assert draw(logits, asked, room, rank) == expected(logits, asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_that_tie_with_the_last_one_kept_are_kept(dtype: torch.dtype) -> None:
    """Few distinct logits, of both signs, and -inf: both ways to the threshold, and half of two."""
    torch.manual_seed(1)
    rng = random.Random(1)
    n, vocab = 16, 2600
    logits = torch.randint(-3, 4, (n, vocab)).to(dtype) / 2
    logits[::3] -= 9
    logits[5::7, 100:] = -math.inf
    asked = [
        SamplingParams(
            temperature=rng.choice([0.01, 0.2, 1.0, 1e12, 1e30]),
            top_k=rng.choice([0, 3, 500, 2000]),
            top_p=rng.choice([1.0, 0.4, 0.8, 0.99]),
        )
        for _ in range(n)
    ]
    for room in (64, 4096):
        assert draw(logits, asked, room, 16) == expected(logits, asked)


def test_a_row_without_a_finite_largest_logit_ends() -> None:
    logits = torch.randn(3, 700)
    logits[0, 5], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    asked = [SamplingParams(top_k=5, top_p=0.5, min_p=0.1)] * 3
    for room in (64, 4096):
        assert all(0 <= token < 700 for token in draw(logits, asked, room, 16))
