"""top_k, top_p and min_p on the device: per row the smallest weight that is kept.

By the rules of the general sampler: each is a threshold on e = exp((logit - largest) /
temperature), so that tokens which tie with the last one kept are kept. Nothing is sorted:

1. The r-th largest of the peaks of a row's blocks bounds its r-th largest logit from below; three
   such r give three levels of e, and the masses' pass counts how many tokens reach each.
2. The weights that reach the lowest level at which there are no more than ROOM are collected.
3. One program per row finds the thresholds among these, bit by bit of e. If they do not hold the
   answer (a flat row, masses of ties), it goes over the whole row instead, bit by bit of the logit.
4. The masses of the chunks are summed again over what is kept.

A row that asks for none of it leaves each of these kernels at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    load_words,
    row_peak,
    scaled,
    weight_of,
)

# Weights that are collected at most; a power of two.
ROOM = 4096
# The rank of the lowest level: among 152k tokens, some 2,500 reach the 1,536th of the block peaks.
RANK = 1536
_ROW_WARPS = 16  # of the kernels with one program per row
# Bits of an order-preserving integer of a logit, from the top, that tell all logits apart.
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


class Limits(NamedTuple):
    """What each slot asks for."""

    top_k: Tensor  # int32 [slots], 0 = off
    shares: Tensor  # int32 [slots, 2]: top_p * 2**62, low word first; 0 = off
    min_p: Tensor  # float32 [slots], 0 = off


class TruncationScratch:
    """Owns what the kernels of a truncated row leave for each other."""

    def __init__(
        self, n_chunks: int, max_rows: int, device: torch.device, room: int = ROOM, rank: int = RANK
    ) -> None:
        self.room, self.rank = room, rank
        n_blocks = n_chunks * (CHUNK // BLOCK)
        self.block_peaks = torch.empty(max_rows, n_blocks, dtype=torch.float32, device=device)
        # The levels of e, ascending; -1 if the row looks for no threshold.
        self.levels = torch.empty(max_rows, LEVELS, dtype=torch.float32, device=device)
        self.counts = torch.empty(max_rows, LEVELS, n_chunks, dtype=torch.int32, device=device)
        self.found = torch.empty(max_rows, room, dtype=torch.float32, device=device)
        self.floors = torch.empty(max_rows, dtype=torch.float32, device=device)


@triton.jit
def _key_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 `x`."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight_at(key: tl.tensor, peak: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """The weight of the logit of that key."""
    x = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return weight_of(x, peak, heat)


@triton.jit
def _limits_of(
    top_k: tl.tensor, shares: tl.tensor, slot: tl.tensor, VOCAB: tl.constexpr
) -> tl.tensor:
    """k and the share of top_p (uint64), each 0 where it leaves nothing out."""
    k = tl.load(top_k + slot)
    return tl.where(k < VOCAB, k, 0), load_words(shares, slot)


@triton.jit
def _levels_kernel(
    temperatures: tl.tensor, top_k: tl.tensor, shares: tl.tensor, slots: tl.tensor,
    peaks: tl.tensor, block_peaks: tl.tensor, levels: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr, N_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, RANK: tl.constexpr, LEVELS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The level of rank r is at most the e of the r-th largest block peak."""
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = heat_of(temperatures, slot)
    k, share = _limits_of(top_k, shares, slot, VOCAB)
    if (heat > 0.0) & ((k > 0) | (share > 0)):
        peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        i = tl.arange(0, BLOCKS)
        top = tl.load(block_peaks + row * N_BLOCKS + i, mask=i < N_BLOCKS, other=float("-inf"))
        # The upper half of the key is enough for a bound.
        key = _key_of(top) >> 16
        rank = tl.minimum(tl.where(k > 0, k, RANK), RANK)
        # Of each rank, the largest v that so many keys reach; or the least, if there are too few.
        low = rank * 0 - 32768
        middle, high = low, low
        for bit in range(16):
            step = 32768 >> bit
            a = tl.sum((key >= low + step).to(tl.int32), axis=0)
            b = tl.sum((key >= middle + step).to(tl.int32), axis=0)
            c = tl.sum((key >= high + step).to(tl.int32), axis=0)
            low += step * (a >= rank).to(tl.int32)
            middle += step * (b >= tl.maximum(rank >> 2, 1)).to(tl.int32)
            high += step * (c >= tl.maximum(rank >> 4, 1)).to(tl.int32)
        # What has no mass decides nothing: below 1 / scale there is no need to look.
        least = 1.0 / scale
        tl.store(levels + row * LEVELS, tl.maximum(_weight_at(low << 16, peak, heat), least))
        tl.store(levels + row * LEVELS + 1, tl.maximum(_weight_at(middle << 16, peak, heat), least))
        tl.store(levels + row * LEVELS + 2, tl.maximum(_weight_at(high << 16, peak, heat), least))
    else:
        tl.store(levels + row * LEVELS, -1.0)


@triton.jit
def _choose(
    levels: tl.tensor, counts: tl.tensor, row: tl.tensor, chunk: tl.tensor,
    N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr, LEVELS: tl.constexpr, ROOM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The lowest level that no more than ROOM tokens reach, how many do, and how many of them in
    chunks before `chunk`; if there is none, the highest level and more than ROOM."""
    c = tl.arange(0, CHUNKS)
    level = tl.load(levels + row * LEVELS)
    n = level.to(tl.int32) * 0 + ROOM + 1
    before = n
    for i in tl.static_range(LEVELS):
        at = counts + (row * LEVELS + i) * N_CHUNKS + c
        count = tl.load(at, mask=c < N_CHUNKS, other=0)
        total = tl.sum(count, axis=0)
        take = n > ROOM
        level = tl.where(take, tl.load(levels + row * LEVELS + i), level)
        before = tl.where(take, tl.sum(tl.where(c < chunk, count, 0), axis=0), before)
        n = tl.where(take, total, n)
    return level, n, before


@triton.jit
def _collect_kernel(
    logits: tl.tensor, temperatures: tl.tensor, slots: tl.tensor, peaks: tl.tensor,
    levels: tl.tensor, counts: tl.tensor, found: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr, ROOM: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(levels + row * LEVELS) > 0.0:
        heat = heat_of(temperatures, tl.load(slots + row))
        peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        level, n, before = _choose(levels, counts, row, chunk, N_CHUNKS, CHUNKS, LEVELS, ROOM)
        top = tl.load(peaks + row * N_CHUNKS + chunk)
        if (n <= ROOM) & (weight_of(top, peak, heat) >= level):
            e = weight_of(load_chunk(logits, row, chunk, VOCAB, CHUNK), peak, heat)
            hit = e >= level
            at = before + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            tl.store(found + row * ROOM + at, e, mask=hit & (at < ROOM))


@triton.jit
def _smallest_kept(bits: tl.tensor, weight: tl.tensor, goal: tl.tensor) -> tl.tensor:
    """int32: the largest v such that the weights of all bits >= v sum to at least `goal`.

    bits: int32 [ROOM] of floats in [0, 1]. Two bits of v a turn; all of them reach v = 0.
    """
    v = tl.sum(bits * 0, axis=0)
    for turn in range(15):
        step = (v * 0 + 1) << (28 - 2 * turn)
        a = tl.sum(tl.where(bits >= v + step, weight, 0), axis=0)
        b = tl.sum(tl.where(bits >= v + 2 * step, weight, 0), axis=0)
        c = tl.sum(tl.where(bits >= v + 3 * step, weight, 0), axis=0)
        v += step * ((a >= goal).to(tl.int32) + (b >= goal).to(tl.int32) + (c >= goal).to(tl.int32))
    return v


@triton.jit
def _row_search(
    logits: tl.tensor, row: tl.tensor, peak: tl.tensor, heat: tl.tensor, scale: tl.tensor,
    goal: tl.tensor,
    BY_MASS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr,
    KEY_BITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """float32: the largest e such that all tokens of no smaller e are `goal` (int64), in number or
    in mass; two bits of the logit's key a turn, all chunks of the row each."""
    SHIFT: tl.constexpr = 32 - KEY_BITS
    v = goal * 0  # the key's upper bits, above those of the least int32
    for turn in range(KEY_BITS // 2):
        step = (goal * 0 + 1) << (KEY_BITS - 2 - 2 * turn)
        low = (((v + step) << SHIFT) - 2147483648).to(tl.int32)
        middle = (((v + 2 * step) << SHIFT) - 2147483648).to(tl.int32)
        high = (((v + 3 * step) << SHIFT) - 2147483648).to(tl.int32)
        a = tl.zeros([CHUNK], tl.int64)
        b = tl.zeros([CHUNK], tl.int64)
        c = tl.zeros([CHUNK], tl.int64)
        for chunk in range(N_CHUNKS):
            x = load_chunk(logits, row, chunk, VOCAB, CHUNK)
            key = _key_of(x)
            w = (key * 0 + 1).to(tl.int64)
            if BY_MASS:
                w = fixed(weight_of(x, peak, heat), scale)
            a += tl.where(key >= low, w, 0)
            b += tl.where(key >= middle, w, 0)
            c += tl.where(key >= high, w, 0)
        reached = (tl.sum(a, axis=0) >= goal).to(tl.int64) + (tl.sum(b, axis=0) >= goal)
        v += step * (reached + (tl.sum(c, axis=0) >= goal))
    key = ((v << SHIFT) - 2147483648).to(tl.int32)
    # The bits that a shorter type does not have: zeros, in a negative number's key ones.
    key = tl.where(key < 0, key | ((1 << SHIFT) - 1), key)
    return _weight_at(key, peak, heat)


@triton.jit
def _row_mass(
    logits: tl.tensor, row: tl.tensor, peak: tl.tensor, heat: tl.tensor, scale: tl.tensor,
    floor: tl.tensor, VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    mass = tl.zeros([CHUNK], tl.int64)
    for chunk in range(N_CHUNKS):
        e = weight_of(load_chunk(logits, row, chunk, VOCAB, CHUNK), peak, heat)
        mass += tl.where(e >= floor, fixed(e, scale), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _cut_kernel(
    logits: tl.tensor, temperatures: tl.tensor, top_k: tl.tensor, shares: tl.tensor,
    min_p: tl.tensor, slots: tl.tensor, peaks: tl.tensor, masses: tl.tensor, levels: tl.tensor,
    counts: tl.tensor, found: tl.tensor, floors: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr, ROOM: tl.constexpr, KEY_BITS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The smallest e that top_k, then top_p, then min_p keep; 0 in a row that keeps all."""
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = heat_of(temperatures, slot)
    floor = tl.where(heat > 0.0, tl.load(min_p + slot), 0.0)
    if tl.load(levels + row * LEVELS) > 0.0:
        k, share = _limits_of(top_k, shares, slot, VOCAB)
        peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        level, n, _ = _choose(levels, counts, row, 0, N_CHUNKS, CHUNKS, LEVELS, ROOM)
        i = tl.arange(0, ROOM)
        there = i < n
        e = tl.load(found + row * ROOM + i, mask=there & (n <= ROOM), other=0.0)
        bits = e.to(tl.int32, bitcast=True)
        w = fixed(e, scale)
        c = tl.arange(0, CHUNKS)
        total = tl.load(masses + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=0)
        total = tl.sum(total, axis=0)
        kth = floor * 0.0
        # Below the least level nothing has mass: then fewer than k do, and all of them are found.
        whole = (n <= ROOM) & ((k <= n) | (level <= 1.0 / scale))
        if whole & (k > 0) & (k <= n):
            v = _smallest_kept(bits, there.to(tl.int32), k)
            kth = v.to(tl.float32, bitcast=True)
            total = tl.sum(tl.where(e >= kth, w, 0), axis=0)
        goal = tl.maximum(scaled(share, total), 1)
        whole &= tl.sum(w, axis=0) >= goal
        if whole:
            floor = tl.maximum(floor, kth)
            if share > 0:
                v = _smallest_kept(bits, w, goal)
                floor = tl.maximum(floor, v.to(tl.float32, bitcast=True))
        elif peak - peak == 0.0:  # finite: any other row ends in an error
            if k > 0:
                kth = _row_search(
                    logits, row, peak, heat, scale, k.to(tl.int64),
                    False, VOCAB, CHUNK, N_CHUNKS, KEY_BITS,
                )  # fmt: skip
                total = _row_mass(logits, row, peak, heat, scale, kth, VOCAB, CHUNK, N_CHUNKS)
                floor = tl.maximum(floor, kth)
            if share > 0:
                goal = tl.maximum(scaled(share, total), 1)
                last = _row_search(
                    logits, row, peak, heat, scale, goal,
                    True, VOCAB, CHUNK, N_CHUNKS, KEY_BITS,
                )  # fmt: skip
                floor = tl.maximum(floor, last)
    tl.store(floors + row, floor)


@triton.jit
def _kept_kernel(
    logits: tl.tensor, temperatures: tl.tensor, slots: tl.tensor, peaks: tl.tensor,
    floors: tl.tensor, masses: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Per chunk of a row with a floor, the sum of the weights that reach it."""
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    floor = tl.load(floors + row)
    if floor > 0.0:
        heat = heat_of(temperatures, tl.load(slots + row))
        peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        mass = (row * 0).to(tl.int64)
        if weight_of(tl.load(peaks + row * N_CHUNKS + chunk), peak, heat) >= floor:
            e = weight_of(load_chunk(logits, row, chunk, VOCAB, CHUNK), peak, heat)
            mass = tl.sum(tl.where(e >= floor, fixed(e, scale), 0), axis=0)
        tl.store(masses + row * N_CHUNKS + chunk, mass)


def truncate(
    scratch: TruncationScratch, logits: Tensor, temperatures: Tensor, slots: Tensor,
    limits: Limits, peaks: Tensor, masses: Tensor, scale: float, **shared: Any,
) -> None:  # fmt: skip
    """`scratch.floors` and, where there is one, `masses` of what is kept.

    After `masses_kernel` has counted at `scratch.levels`, which `find_levels` gives it.
    shared: what all sampling kernels are launched with.
    """
    s, (n_rows, n_chunks) = scratch, (len(logits), masses.shape[1])
    launch(_collect_kernel, (n_rows, n_chunks))(
        logits, temperatures, slots, peaks, s.levels, s.counts, s.found,
        LEVELS=LEVELS, ROOM=s.room, **shared,
    )  # fmt: skip
    launch(_cut_kernel, (n_rows,))(
        logits, temperatures, limits.top_k, limits.shares, limits.min_p, slots, peaks, masses,
        s.levels, s.counts, s.found, s.floors, scale,
        LEVELS=LEVELS, ROOM=s.room, KEY_BITS=_KEY_BITS[logits.dtype],
        **{**shared, "num_warps": _ROW_WARPS},
    )  # fmt: skip
    launch(_kept_kernel, (n_rows, n_chunks))(
        logits, temperatures, slots, peaks, s.floors, masses, scale, **shared
    )


def find_levels(
    scratch: TruncationScratch, temperatures: Tensor, slots: Tensor, limits: Limits, peaks: Tensor,
    scale: float, VOCAB: int, N_CHUNKS: int, CHUNKS: int, PDL: bool, launch_pdl: bool,
) -> None:  # fmt: skip
    """`scratch.levels`, from the peaks of chunks and blocks."""
    n_blocks = scratch.block_peaks.shape[1]
    launch(_levels_kernel, (len(slots),))(
        temperatures, limits.top_k, limits.shares, slots, peaks, scratch.block_peaks,
        scratch.levels, scale,
        VOCAB=VOCAB, N_CHUNKS=N_CHUNKS, CHUNKS=CHUNKS, N_BLOCKS=n_blocks,
        BLOCKS=triton.next_power_of_2(n_blocks), RANK=scratch.rank, LEVELS=LEVELS, PDL=PDL,
        num_warps=_ROW_WARPS, launch_pdl=launch_pdl,
    )  # fmt: skip
