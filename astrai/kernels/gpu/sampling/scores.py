"""Log-probabilities of drawn tokens on the device: of the raw logits, as in the general sampler.

1. Per chunk of a row its largest logit, and that of each block.
2. Per chunk the mass below the row's largest logit, and how many logits exceed the token's.
3. One program per row adds these up, and takes the alternatives one by one: the largest of the
   blocks' peaks is the next, whose block then counts with what is left of it.

A row that asks for none of it leaves after the first kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import release_next, wait_for_inputs
from astrai.kernels.gpu.launch import launch
from astrai.kernels.gpu.sampling.masses import (
    BLOCK,
    CHUNK,
    fixed,
    load_chunk,
    peaks_kernel,
    row_peak,
)

if TYPE_CHECKING:
    from astrai.kernels.gpu.sampling.sampling import SamplingScratch

# Alternatives at most; as many as SamplingParams allows.
TOPS = 20
# int32 words of a row's scores: the token's logit, the row's largest logit (float32), the rank,
# one unused, the mass (float64, low word first), then ids and logits (float32) of the alternatives.
WORDS = 6 + 2 * TOPS


class Scores(NamedTuple):
    """What a row's words say."""

    own: float  # the token's logit
    peak: float  # the largest logit
    mass: float  # sum of exp(logit - peak)
    rank: int  # 1 = no logit is larger than the token's
    top: list[tuple[int, float]]  # (token, logit), most probable first, lowest id among equals


def scores_of(words: np.ndarray) -> Scores:
    """words: int32 [WORDS]."""
    numbers = words.view(np.float32)
    ids, logits = words[6 : 6 + TOPS].tolist(), numbers[6 + TOPS :].tolist()
    top = [(token, logit) for token, logit in zip(ids, logits) if token >= 0]
    mass = float(words[4:6].view(np.float64)[0])
    return Scores(float(numbers[0]), float(numbers[1]), mass, int(words[2]), top)


@triton.jit
def _sums_kernel(
    logits: tl.tensor, tokens: tl.tensor, slots: tl.tensor, asked: tl.tensor, peaks: tl.tensor,
    masses: tl.tensor, above: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(asked + tl.load(slots + row)) > 0:
        peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        own = tl.load(logits + row * VOCAB + tl.load(tokens + row)).to(tl.float32)
        x = load_chunk(logits, row, chunk, VOCAB, CHUNK)
        e = tl.exp(x - peak)
        e = tl.where(e == e, e, 0.0)
        tl.store(masses + row * N_CHUNKS + chunk, tl.sum(fixed(e, scale), axis=0))
        tl.store(above + row * N_CHUNKS + chunk, tl.sum((x > own).to(tl.int32), axis=0))


@triton.jit
def _scores_kernel(
    logits: tl.tensor, tokens: tl.tensor, slots: tl.tensor, asked: tl.tensor, peaks: tl.tensor,
    block_peaks: tl.tensor, masses: tl.tensor, above: tl.tensor, out: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr, N_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TOPS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    n_top = tl.load(asked + tl.load(slots + row)) - 1
    if n_top >= 0:
        words = out + row * (6 + 2 * TOPS)
        c = tl.arange(0, CHUNKS)
        chunks = row * N_CHUNKS + c
        mass = tl.sum(tl.load(masses + chunks, mask=c < N_CHUNKS, other=0), axis=0)
        rank = tl.sum(tl.load(above + chunks, mask=c < N_CHUNKS, other=0), axis=0) + 1
        own = tl.load(logits + row * VOCAB + tl.load(tokens + row)).to(tl.float32)
        tl.store(words, own.to(tl.int32, bitcast=True))
        tl.store(words + 1, row_peak(peaks, row, N_CHUNKS, CHUNKS).to(tl.int32, bitcast=True))
        tl.store(words + 2, rank)
        bits = (mass.to(tl.float64) / scale).to(tl.int64, bitcast=True)
        tl.store(words + 4, bits.to(tl.int32))
        tl.store(words + 5, (bits >> 32).to(tl.int32))
        t = tl.arange(0, 32)
        tl.store(words + 6 + t, tl.full([32], -1, tl.int32), mask=t < TOPS)
        i = tl.arange(0, BLOCKS)
        tops = tl.load(block_peaks + row * N_BLOCKS + i, mask=i < N_BLOCKS, other=float("-inf"))
        # The one taken last: everything larger has been taken, and so have equals of lower ids.
        last = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        taken = n_top * 0 - 1
        for n in range(0, n_top):
            value = tl.max(tops, axis=0)
            block = tl.minimum(tl.min(tl.where(tops == value, i, BLOCKS), axis=0), N_BLOCKS - 1)
            at = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
            x = x.to(tl.float32)
            left = (x < last) | ((x == last) & (at > taken))
            token = tl.min(tl.where(left & (x == value), at, VOCAB), axis=0)
            if (value > float("-inf")) & (token < VOCAB):
                tl.store(words + 6 + n, token)
                tl.store(words + 6 + TOPS + n, value.to(tl.int32, bitcast=True))
            left = (x < value) | ((x == value) & (at > token))
            rest = tl.max(tl.where(left, x, float("-inf")), axis=0)
            tops = tl.where(i == block, rest, tops)
            last, taken = value, token


def score(
    scratch: SamplingScratch,
    logits: Tensor,
    tokens: Tensor,
    slots: Tensor,
    asked: Tensor,
    out: Tensor,
    pdl: bool = False,
) -> None:
    """out int32 [R, WORDS]: scores of `tokens` (int32 [R]) under `logits` [R, vocab_size].

    asked: int32 [slots], how many alternatives each slot asks for, plus 1; 0: no scores, and the
    row of `out` is left alone. See `scores_of` for reading a row. Overwrites what `sample` left in
    the scratch.
    """
    s, blocks = scratch, scratch.truncation.block_peaks
    n_rows, row = logits.shape[0], s.options(pdl)
    chunks = triton.next_power_of_2(s.n_chunks)
    launch(peaks_kernel, (n_rows, s.n_chunks))(
        logits, s.peaks, s.best, blocks,
        CHUNK=CHUNK, BLOCK=BLOCK, BLOCKS=CHUNK // BLOCK, num_warps=4, **row,
    )  # fmt: skip
    launch(_sums_kernel, (n_rows, s.n_chunks))(
        logits, tokens, slots, asked, s.peaks, s.masses, s.above, s.scale,
        CHUNK=CHUNK, CHUNKS=chunks, num_warps=4, **row,
    )  # fmt: skip
    launch(_scores_kernel, (n_rows,))(
        logits, tokens, slots, asked, s.peaks, blocks, s.masses, s.above, out, s.scale,
        CHUNKS=chunks, N_BLOCKS=blocks.shape[1], BLOCKS=triton.next_power_of_2(blocks.shape[1]),
        BLOCK=BLOCK, TOPS=TOPS, num_warps=4, **row,
    )  # fmt: skip
