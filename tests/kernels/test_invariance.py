"""Promise 1, where it is hardest: a row's bits do not depend on what else is in the batch."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from astrai.models.decoder import Decoder
from tests.kernels.harness import (
    SHAPES,
    Chunk,
    make_config,
    make_decoder,
    mixed,
    one_by_one,
    random_tokens,
    run,
    whole,
)

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["cpu", "numba"]


@functools.cache
def decoder_of(shape: str, dtype: torch.dtype) -> Decoder:
    return make_decoder(make_config(shape), dtype)


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(sorted(SHAPES)),
    page_size=st.sampled_from([16, 64]),
)
@example(seed=109737, shape="grouped heads", page_size=16)  # threads met in the middle of a row
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_and_in_any_batch(
    dtype: torch.dtype, backend: str, seed: int, shape: str, page_size: int
) -> None:
    rng = random.Random(seed)
    decoder = decoder_of(shape, dtype)
    lengths = [rng.choice([1, 2, 16, 65, rng.randint(1, 420)]) for _ in range(rng.randint(2, 16))]
    tokens = random_tokens(rng, lengths)
    alone = run(decoder, backend, tokens, whole(tokens), rng, page_size)
    batched = run(decoder, backend, tokens, mixed(tokens, rng), rng, page_size)
    for i, (x, y) in enumerate(zip(alone, batched)):
        assert torch.equal(x, y), f"task {i} of {lengths = }"


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whole_and_token_by_token(dtype: torch.dtype, backend: str, shape: str) -> None:
    rng = random.Random(7)
    decoder = decoder_of(shape, dtype)
    tokens = random_tokens(rng, [200])
    (whole_rows,) = run(decoder, backend, tokens, whole(tokens), rng)
    (single_rows,) = run(decoder, backend, tokens, one_by_one(tokens), rng)
    assert torch.equal(whole_rows, single_rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_past_a_thousand_positions(dtype: torch.dtype, backend: str) -> None:
    """Sums longer than the matmul keeps in one order: the last rows beside a longer neighbour."""
    rng = random.Random(9)
    decoder = decoder_of("one kv head", dtype)
    tokens = random_tokens(rng, [1030, 1300])
    alone = run(decoder, backend, tokens, whole(tokens), rng, 64)
    ticks = [[Chunk(0, 1015), Chunk(1, 1285)], *([Chunk(0, 1), Chunk(1, 1)] for _ in range(15))]
    together = run(decoder, backend, tokens, ticks, rng, 64)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [2, 3, 8, 33])
def test_logits_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype, n_rows: int) -> None:
    decoder = decoder_of("grouped heads", dtype)
    hidden = torch.randn(n_rows, decoder.config.hidden_size).to(dtype)
    together = decoder.logits(hidden)
    for i in range(n_rows):
        assert torch.equal(decoder.logits(hidden[i : i + 1])[0], together[i])
