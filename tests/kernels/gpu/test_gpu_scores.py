"""Log-probabilities inside the launch, through the interpreter, against the general sampler."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.front.sampling_params import MAX_LOGPROBS
from astrai.kernels.gpu.sampling.sampling import SamplingScratch
from astrai.kernels.gpu.sampling.scores import TOPS, WORDS, score, scores_of
from astrai.runtime.sampling.sampler import Sampler, Score, score_of

CPU = torch.device("cpu")
VOCAB = 5003


def scores(logits: Tensor, tokens: list[int], n_top: list[int | None]) -> list[Score | None]:
    """By the kernels, for slots in reverse; None where none are asked for."""
    n, vocab = logits.shape
    slots = torch.arange(n - 1, -1, -1, dtype=torch.int32)
    asked = torch.tensor([0 if top is None else top + 1 for top in n_top[::-1]], dtype=torch.int32)
    out = torch.full((n, WORDS), 77, dtype=torch.int32)
    drawn = torch.tensor(tokens, dtype=torch.int32)
    score(SamplingScratch(vocab, n, CPU), logits, drawn, slots, asked, out)
    left_alone = [top is None for top in n_top]
    assert [bool((row == 77).all()) for row in out] == left_alone
    return [
        None if top is None else score_of(*scores_of(words))
        for top, words in zip(n_top, out.numpy())
    ]


def check(logits: Tensor, tokens: list[int], n_top: list[int]) -> None:
    found = scores(logits, tokens, list(n_top))
    sampler = Sampler(logits.shape[1], len(tokens), "cpu")
    for i, (ours, n) in enumerate(zip(found, n_top)):
        expected = sampler.prompt_logprobs(logits[i : i + 1].float(), tokens[i : i + 1], n)[0]
        assert ours is not None
        assert (ours.rank, [token for token, _ in ours.top]) == (
            expected.rank,
            [token for token, _ in expected.top],
        )
        numbers = [ours.logprob, *(value for _, value in ours.top)]
        assert numbers == pytest.approx([expected.logprob, *(v for _, v in expected.top)], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [VOCAB, 40])
def test_scores_are_those_of_the_general_sampler(dtype: torch.dtype, vocab: int) -> None:
    rng = random.Random(vocab)
    n_top = [0, 1, 2, 7, MAX_LOGPROBS, MAX_LOGPROBS]
    logits = torch.randn(len(n_top), vocab, generator=torch.Generator().manual_seed(1)) * 3
    tokens = [int(logits[i].argmax()) if i % 2 else rng.randrange(vocab) for i in range(6)]
    check(logits.to(dtype), tokens, n_top)


def test_equals_are_taken_in_the_order_of_their_ids() -> None:
    """Many within a block, and blocks of the same peak."""
    logits = torch.randint(-3, 3, (5, VOCAB), generator=torch.Generator().manual_seed(2)).float()
    logits[1] = 0.0
    logits[2, 100:4000:61] = 9.0
    logits[3, :10] = 5.0
    logits[3, 4990:] = 5.0
    check(logits, [4, VOCAB - 1, 161, 3, 0], [20, 20, 20, 20, 3])


def test_only_rows_that_ask_are_written() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    found = scores(logits, [1, 2, 3, 4], [None, 3, None, 0])
    assert [None if score is None else len(score.top) for score in found] == [None, 3, None, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_have_no_score(broken: float) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, 4321] = broken
    ours, fine = scores(logits, [7, 7], [5, 5])
    assert ours is not None and math.isnan(ours.logprob)
    assert fine is not None and fine.logprob == pytest.approx(-math.log(VOCAB))


def test_there_is_room_for_all_alternatives_that_may_be_asked() -> None:
    assert TOPS == MAX_LOGPROBS
