"""Sampling on the device, by the rules of `astrai.runtime.sampling.sampler`.

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

from astrai.kernels.gpu.heads import release_next, wait_for_inputs
from astrai.kernels.gpu.launch import launch
from astrai.kernels.gpu.sampling.masses import (
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
from astrai.kernels.gpu.sampling.truncation import Limits, TruncationScratch, find_levels, truncate

# Up to this many rows, kernels with one program per chunk have more warps.
FEW_ROWS = 8


class SamplingScratch:
    """Owns the per-chunk partial results of `sample` and `score`."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.n_chunks = triton.cdiv(vocab_size, CHUNK)
        # The sum of a row is below vocab_size * 2**bits <= 2**61.
        self.bits = 61 - (vocab_size - 1).bit_length()
        self.scale = 2.0**self.bits
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
def _find_chunk(
    masses: tl.tensor, row: tl.tensor, bits: tl.tensor, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tensor:
    """The chunk of the token that `bits` choose, and what the running sum in it must exceed.

    Found by each warp, so that none waits: the group of chunks, of at most 32, then the chunk.
    """
    GROUPS: tl.constexpr = min(CHUNKS, 32)
    EACH: tl.constexpr = CHUNKS // GROUPS
    place = masses + row * N_CHUNKS
    c = tl.arange(0, GROUPS) * EACH
    mass = tl.load(place + c, mask=c < N_CHUNKS, other=0)
    for i in tl.static_range(1, EACH):
        mass += tl.load(place + c + i, mask=c + i < N_CHUNKS, other=0)
    # In [0, mass of the row): the token is the first whose running sum exceeds it.
    goal = scaled(bits, tl.sum(mass, axis=0))
    passed = tl.cumsum(mass, axis=0) <= goal
    goal -= tl.sum(tl.where(passed, mass, 0), axis=0)
    first = tl.sum(passed.to(tl.int32), axis=0) * EACH
    chunk = first
    for i in tl.static_range(EACH - 1):
        one = tl.load(place + first + i, mask=first + i < N_CHUNKS, other=0)
        step = (chunk == first + i) & (one <= goal)
        goal -= tl.where(step, one, 0)
        chunk += step.to(tl.int32)
    return tl.minimum(chunk, N_CHUNKS - 1), goal


@triton.jit
def _pick_kernel(
    logits: tl.tensor, temperatures: tl.tensor, seeds: tl.tensor, slots: tl.tensor,
    positions: tl.tensor, last: tl.tensor, peaks: tl.tensor, best: tl.tensor, masses: tl.tensor,
    floors: tl.tensor, tokens: tl.tensor, tops: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    SHAPED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # What is read before the wait is older than the kernel before this one: see `masses_kernel`.
    slot = tl.load(slots + row)
    heat = heat_of(temperatures, slot)
    # Of the token that is drawn. Past the nearest cache, which is only sure after the wait.
    position = tl.load(positions + row, cache_modifier=".cg") + 1
    bits = _draw_bits(seeds, slot, position)
    peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
    wait_for_inputs(PDL)
    release_next(PDL)
    if heat > 0.0:
        chunk, goal = _find_chunk(masses, row, bits, N_CHUNKS, CHUNKS)
        e = weight_of(load_chunk(logits, row, chunk, VOCAB, CHUNK), peak, heat)
        if SHAPED:
            e = tl.where(e >= tl.load(floors + row), e, 0.0)
        w = fixed(e, scale)
        token = chunk * CHUNK + tl.sum((tl.cumsum(w, axis=0) <= goal).to(tl.int32), axis=0)
    else:
        c = tl.arange(0, CHUNKS)
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
    # Fewer warps are fewer instructions in all, more are fewer one after another.
    warps = 4 if n_rows <= FEW_ROWS else 1
    launch(peaks_kernel, (n_rows, s.n_chunks))(
        logits, s.peaks, s.best, t.block_peaks,
        CHUNK=CHUNK, BLOCK=BLOCK, BLOCKS=CHUNK // BLOCK if shaped else 0, num_warps=warps, **row,
    )  # fmt: skip
    if limits is not None:
        find_levels(t, temperatures, slots, limits, s.peaks, s.scale, CHUNKS=chunks, **row)
    launch(masses_kernel, (n_rows, s.n_chunks))(
        logits, temperatures, slots, s.peaks, s.masses, t.levels, t.counts,
        LEVELS=LEVELS if shaped else 0, BITS=s.bits, THREADS=32 * warps,
        **{**shared, "num_warps": warps},
    )  # fmt: skip
    if limits is not None:
        truncate(t, logits, temperatures, slots, limits, s.peaks, s.masses, s.scale, **shared)
    launch(_pick_kernel, (n_rows,))(
        logits, temperatures, seeds, slots, positions, last, s.peaks, s.best,
        s.masses, t.floors, tokens, tops, s.scale, SHAPED=shaped, **shared,
    )  # fmt: skip
