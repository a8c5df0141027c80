"""Greedy and temperature sampling on the device, by the rules of `astrai.inference.sampler`.

The same 62 random bits of (seed, position), the same fixed-point sum of exp((logit - largest) /
temperature), the same inverse CDF in vocabulary order: integer sums do not depend on their order,
so a row's token does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.triton.heads import release_next, wait_for_inputs
from astrai.kernels.triton.launch import launch

_CHUNK = 2048


class SamplingScratch:
    """Owns the per-chunk partial results of `sample`."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.n_chunks = triton.cdiv(vocab_size, _CHUNK)
        # The sum of a row is below vocab_size * 2**bits <= 2**61.
        self.scale = 2.0 ** (61 - (vocab_size - 1).bit_length())
        shape = (max_rows, self.n_chunks)
        self.peaks = torch.empty(shape, dtype=torch.float32, device=device)
        self.best = torch.empty(shape, dtype=torch.int32, device=device)
        self.masses = torch.empty(shape, dtype=torch.int64, device=device)


@triton.jit
def _peaks_kernel(
    logits: tl.tensor, peaks: tl.tensor, best: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, axis=0)
    bad = tl.sum((x != x).to(tl.int32), axis=0)
    where = tl.min(tl.where(x == peak, at, VOCAB), axis=0)
    tl.store(peaks + row * N_CHUNKS + chunk, tl.where(bad > 0, float("nan"), peak))
    tl.store(best + row * N_CHUNKS + chunk, where)


@triton.jit
def _row_peak(
    peaks: tl.tensor, row: tl.tensor, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tensor:
    c = tl.arange(0, CHUNKS)
    p = tl.load(peaks + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=float("-inf"))
    bad = tl.sum((p != p).to(tl.int32), axis=0)
    return tl.where(bad > 0, float("nan"), tl.max(p, axis=0))


@triton.jit
def _fixed(x: tl.tensor, peak: tl.tensor, heat: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """int64: exp((x - peak) / heat) in fixed point; 0 for what is not finite."""
    e = tl.exp(tl.div_rn(x - peak, heat)) * scale
    return tl.where(e == e, e, 0.0).to(tl.int64)


@triton.jit
def _masses_kernel(
    logits: tl.tensor, temperatures: tl.tensor, slots: tl.tensor, peaks: tl.tensor,
    masses: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heat = tl.load(temperatures + tl.load(slots + row))
    if heat > 0.0:
        peak = _row_peak(peaks, row, N_CHUNKS, CHUNKS)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
        w = _fixed(x.to(tl.float32), peak, tl.maximum(heat, 1.0e-30), scale)
        tl.store(masses + row * N_CHUNKS + chunk, tl.sum(w, axis=0))


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
    tokens: tl.tensor, tops: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = tl.load(temperatures + slot)
    position = tl.load(positions + row) + 1  # of the token that is drawn
    peak = _row_peak(peaks, row, N_CHUNKS, CHUNKS)
    c = tl.arange(0, CHUNKS)
    if heat > 0.0:
        mass = tl.load(masses + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=0)
        ends = tl.cumsum(mass, axis=0)
        whole = tl.sum(mass, axis=0).to(tl.uint64)
        bits = _draw_bits(seeds, slot, position)
        # floor(bits * whole / 2**62): in [0, whole), and the token is the first that exceeds it.
        goal = ((tl.umulhi(bits, whole) << 2) | ((bits * whole) >> 62)).to(tl.int64)
        chunk = tl.sum(((ends <= goal) & (c < N_CHUNKS)).to(tl.int32), axis=0)
        chunk = tl.minimum(chunk, N_CHUNKS - 1)
        goal -= tl.sum(tl.where(c < chunk, mass, 0), axis=0)
        i = tl.arange(0, CHUNK)
        at = chunk * CHUNK + i
        x = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
        w = _fixed(x.to(tl.float32), peak, tl.maximum(heat, 1.0e-30), scale)
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
    pdl: bool = False,
) -> None:
    """tokens int32 [R]: one per row of `logits` [R, vocab_size]; tops float32 [R]: its largest.

    temperatures float32 [slots], seeds int32 [slots, 2] (low word first); positions int32 [R]:
    those whose logits these are; each moves on by one, except padding's -1. last int32 [slots, 2]:
    see `embed`; the token is left there.
    """
    s = scratch
    n_rows = logits.shape[0]
    chunks = triton.next_power_of_2(s.n_chunks)
    shared: dict[str, Any] = {
        "VOCAB": s.vocab_size, "CHUNK": _CHUNK, "N_CHUNKS": s.n_chunks, "PDL": pdl,
        "num_warps": 4, "launch_pdl": pdl,
    }  # fmt: skip
    launch(_peaks_kernel, (n_rows, s.n_chunks))(logits, s.peaks, s.best, **shared)
    launch(_masses_kernel, (n_rows, s.n_chunks))(
        logits, temperatures, slots, s.peaks, s.masses, s.scale, CHUNKS=chunks, **shared
    )
    launch(_pick_kernel, (n_rows,))(
        logits, temperatures, seeds, slots, positions, last, s.peaks, s.best,
        s.masses, tokens, tops, s.scale, CHUNKS=chunks, **shared,
    )  # fmt: skip
