"""Sampling on the device, by the rules of `astrai.inference.sampler`.

The same 62 random bits of (seed, position), the same fixed-point sum of exp((logit - largest) /
temperature), the same thresholds of top_k, top_p and min_p, the same inverse CDF in vocabulary
order: integer sums do not depend on their order, so a row's token does not depend on the rows
beside it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.triton.heads import release_next, wait_for_inputs
from astrai.kernels.triton.launch import launch
from astrai.kernels.triton.masses import (
    BLOCK,
    CHUNK,
    LEVELS,
    fixed,
    heat_of,
    load_chunk,
    masses_kernel,
    peaks_kernel,
    row_peak,
    scaled,
    weight_of,
)
from astrai.kernels.triton.truncation import Limits, TruncationScratch, find_levels, truncate


class SamplingScratch:
    """Owns the per-chunk partial results of `sample` and `score`."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.n_chunks = triton.cdiv(vocab_size, CHUNK)
        # The sum of a row is below vocab_size * 2**bits <= 2**61.
        self.scale = 2.0 ** (61 - (vocab_size - 1).bit_length())
        shape = (max_rows, self.n_chunks)
        self.peaks = torch.empty(shape, dtype=torch.float32, device=device)
        self.best = torch.empty(shape, dtype=torch.int32, device=device)
        self.masses = torch.empty(shape, dtype=torch.int64, device=device)
        self.above = torch.empty(shape, dtype=torch.int32, device=device)
        self.truncation = TruncationScratch(self.n_chunks, max_rows, device)

    def options(self, pdl: bool) -> dict[str, Any]:
        """What every kernel over rows of logits is launched with."""
        return {
            "VOCAB": self.vocab_size, "N_CHUNKS": self.n_chunks, "PDL": pdl, "launch_pdl": pdl,
        }  # fmt: skip


@triton.jit
def _draw_bits(seeds: tl.tensor, slot: tl.tensor, position: tl.tensor) -> tl.tensor:
    """uint64: the 62 bits of (seed, position)."""
    low = tl.load(seeds + 2 * slot).to(tl.uint32, bitcast=True)
    high = tl.load(seeds + 2 * slot + 1).to(tl.uint32, bitcast=True)
    zero = (position * 0).to(tl.uint32)
    x0, x1, _, _ = tl.philox_impl(position.to(tl.uint32), zero, zero, zero, low, high)
    return (x0.to(tl.uint64) | (x1.to(tl.uint64) << 32)) >> 2


@triton.jit
def _pick_kernel(
    logits: tl.tensor, temperatures: tl.tensor, seeds: tl.tensor, slots: tl.tensor,
    positions: tl.tensor, last: tl.tensor, peaks: tl.tensor, best: tl.tensor, masses: tl.tensor,
    floors: tl.tensor, tokens: tl.tensor, tops: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    SHAPED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = heat_of(temperatures, slot)
    position = tl.load(positions + row) + 1  # of the token that is drawn
    peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
    c = tl.arange(0, CHUNKS)
    if heat > 0.0:
        mass = tl.load(masses + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=0)
        ends = tl.cumsum(mass, axis=0)
        # In [0, mass of the row): the token is the first whose running sum exceeds it.
        goal = scaled(_draw_bits(seeds, slot, position), tl.sum(mass, axis=0))
        chunk = tl.sum(((ends <= goal) & (c < N_CHUNKS)).to(tl.int32), axis=0)
        chunk = tl.minimum(chunk, N_CHUNKS - 1)
        goal -= tl.sum(tl.where(c < chunk, mass, 0), axis=0)
        e = weight_of(load_chunk(logits, row, chunk, VOCAB, CHUNK), peak, heat)
        if SHAPED:
            e = tl.where(e >= tl.load(floors + row), e, 0.0)
        w = fixed(e, scale)
        token = chunk * CHUNK + tl.sum((tl.cumsum(w, axis=0) <= goal).to(tl.int32), axis=0)
    else:
        p = tl.load(peaks + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=float("-inf"))
        b = tl.load(best + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=VOCAB)
        token = tl.min(tl.where(p == peak, b, VOCAB), axis=0)
    token = tl.minimum(token, VOCAB - 1)
    tl.store(tokens + row, token)
    tl.store(tops + row, peak)
    tl.store(last + 2 * slot + (position & 1), token)
    tl.store(positions + row, position, mask=position > 0)


def sample(
    scratch: SamplingScratch,
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    slots: Tensor,
    positions: Tensor,
    last: Tensor,
    tokens: Tensor,
    tops: Tensor,
    limits: Limits | None = None,
    pdl: bool = False,
) -> None:
    """tokens int32 [R]: one per row of `logits` [R, vocab_size]; tops float32 [R]: its largest.

    temperatures float32 [slots], seeds int32 [slots, 2] (low word first); positions int32 [R]:
    those whose logits these are; each moves on by one, except padding's -1. last int32 [slots, 2]:
    see `embed`; the token is left there. limits: None if no row is truncated.
    """
    s, t, shaped = scratch, scratch.truncation, limits is not None
    n_rows = logits.shape[0]
    row = s.options(pdl)
    chunks = triton.next_power_of_2(s.n_chunks)
    shared: dict[str, Any] = {**row, "CHUNK": CHUNK, "CHUNKS": chunks, "num_warps": 4}
    launch(peaks_kernel, (n_rows, s.n_chunks))(
        logits, s.peaks, s.best, t.block_peaks,
        CHUNK=CHUNK, BLOCK=BLOCK, BLOCKS=CHUNK // BLOCK if shaped else 0, num_warps=4, **row,
    )  # fmt: skip
    if limits is not None:
        find_levels(t, temperatures, slots, limits, s.peaks, s.scale, CHUNKS=chunks, **row)
    launch(masses_kernel, (n_rows, s.n_chunks))(
        logits, temperatures, slots, s.peaks, s.masses, t.levels, t.counts, s.scale,
        LEVELS=LEVELS if shaped else 0, **shared,
    )  # fmt: skip
    if limits is not None:
        truncate(t, logits, temperatures, slots, limits, s.peaks, s.masses, s.scale, **shared)
    launch(_pick_kernel, (n_rows,))(
        logits, temperatures, seeds, slots, positions, last, s.peaks, s.best,
        s.masses, t.floors, tokens, tops, s.scale, SHAPED=shaped, **shared,
    )  # fmt: skip
