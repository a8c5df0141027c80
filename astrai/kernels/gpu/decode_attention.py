"""Attention of one new position per row over its pages: q/k norm, rope, KV write and merge in one.

The work of all rows is laid end to end in units of BLOCK keys and cut into equal shares, one per
program, so that every program reads the same number of bytes whatever the lengths are:

    row 0, head 0    row 0, head 1    row 1, head 0     ...
    ├──┬──┬──┬──┤    ├──┬──┬──┬──┤    ├──┬──┬──┬──┬──┬──┤
    └─ program 0 ─┘└─ program 1 ──┘└─ program 2 ──┘└─ ...

A program that holds a part of a head's keys leaves (sum, maximum, denominator) in scratch memory;
the last one to arrive adds the parts up in the order of the keys, so results do not depend on who
was last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import (
    frames_of,
    load_angles,
    load_gains,
    load_heads,
    load_keys,
    release_next,
    turn_heads,
    wait_for_inputs,
)
from astrai.kernels.gpu.launch import launch

# Partial results that the last arriver reads at once.
_WIDE = 8
# Shares that one program of the planning kernel lays out.
_PLANNED = 32


class Tuning(NamedTuple):
    """How the kernel runs up to a number of rows."""

    rows: int
    block: int  # keys per step
    warps: int
    stages: int
    programs: int  # per multiprocessor
    # The first block of keys is read before the kernel before this one is done, at the price of
    # registers.
    ahead: bool


# As measured. One row: few programs, each with its own start-up, and latency counts. Many rows: as
# many programs of one warp as a multiprocessor holds at once. Warps that never wait for each other
# keep more bytes in flight than shared steps do.
_MANY = 1 << 30
_TUNINGS = {
    64: (
        Tuning(1, 64, 4, 3, 1, True),
        Tuning(8, 32, 1, 2, 4, False),
        Tuning(16, 32, 1, 2, 6, False),
        Tuning(_MANY, 32, 1, 2, 8, False),
    ),
    128: (
        Tuning(1, 64, 4, 3, 1, True),
        Tuning(4, 64, 2, 2, 3, True),
        Tuning(32, 16, 1, 2, 8, True),
        Tuning(_MANY, 16, 1, 2, 8, False),
    ),
    256: (Tuning(16, 32, 4, 3, 2, True), Tuning(_MANY, 16, 4, 3, 6, False)),
}


class DecodeShape:
    """Compile-time facts of one model and pool, and the scratch memory of the kernel.

    Owns the scratch: partial sums and arrival counters. Does not own pages.
    """

    def __init__(
        self,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        page_size: int,
        max_rows: int,
        device: torch.device,
        tunings: tuple[Tuning, ...] | None = None,
    ) -> None:
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.page_size = page_size
        self.group = n_heads // n_kv_heads
        self.group_padded = triton.next_power_of_2(self.group)
        self.dim_padded = triton.next_power_of_2(head_dim)
        self.tunings = tunings or _TUNINGS[min(max(self.dim_padded, 64), 256)]
        on_gpu = device.type == "cuda"
        sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        self._sms = sms
        self.max_rows = max_rows
        self._most = sms * max(tuning.programs for tuning in self.tunings)
        parts = (2 * self._most, self.group_padded)
        self.sums = torch.empty(*parts, self.dim_padded, dtype=torch.float32, device=device)
        self.peaks = torch.empty(parts, dtype=torch.float32, device=device)
        self.masses = torch.empty(parts, dtype=torch.float32, device=device)
        self.counters = torch.zeros(max_rows * n_kv_heads, dtype=torch.int32, device=device)

    def tuning(self, n_rows: int) -> Tuning:
        return next(tuning for tuning in self.tunings if n_rows <= tuning.rows)

    def programs(self, n_rows: int) -> int:
        return self._sms * self.tuning(n_rows).programs

    def new_plan(self) -> DecodePlan:
        """Memory for `plan_decode`."""
        device, most = self.sums.device, self._most
        return DecodePlan(
            torch.zeros(self.max_rows + 1, dtype=torch.int32, device=device),
            torch.zeros(most, 8, dtype=torch.int32, device=device),
        )


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def _plan_kernel(
    positions: tl.tensor,
    slots: tl.tensor,
    ends: tl.tensor,
    shares: tl.tensor,
    n_rows: tl.tensor,
    n_programs: tl.tensor,
    N_KV: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.arange(0, ROWS)
    position = tl.load(positions + row, mask=row < n_rows, other=-1)
    units = tl.cdiv(position + 1, BLOCK)
    if WINDOW:
        units -= tl.maximum(position + 1 - WINDOW, 0) // BLOCK
    units = tl.where(position >= 0, units, 0) * N_KV
    after = tl.cumsum(units, axis=0)
    total = tl.sum(units, axis=0)
    tl.store(ends, 0)
    tl.store(ends + 1 + row, after, mask=row < n_rows)
    per = tl.maximum(tl.cdiv(total, n_programs), 1)
    program = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    at = program * per
    here = (after[None, :] > at[:, None]) & ((after - units)[None, :] <= at[:, None])
    share = shares + 8 * program
    live = program < n_programs
    tl.store(share, tl.sum(tl.where(here, row[None, :], 0), axis=1), mask=live)
    tl.store(share + 1, tl.sum(tl.where(here, (after - units)[None, :], 0), axis=1), mask=live)
    tl.store(share + 2, tl.sum(tl.where(here, after[None, :], 0), axis=1), mask=live)
    tl.store(share + 3, tl.sum(tl.where(here, position[None, :], 0), axis=1), mask=live)
    slot = tl.load(slots + row, mask=row < n_rows, other=0)
    tl.store(share + 4, tl.sum(tl.where(here, slot[None, :], 0), axis=1), mask=live)
    tl.store(share + 5, tl.zeros_like(program) + per, mask=live)
    tl.store(share + 6, tl.minimum(at + per, total), mask=live)


class DecodePlan(NamedTuple):
    """Who reads what, for one set of positions and one window."""

    ends: Tensor  # int32 [R + 1]: units of the rows before each row
    # int32 [n_programs, 8]: of each program's first unit its row, that row's units from and to, its
    # position and slot; then units per program, and the end of this one's
    shares: Tensor


def plan_decode(
    shape: DecodeShape,
    positions: Tensor,
    slots: Tensor,
    plan: DecodePlan,
    window: int | None,
    pdl: bool = False,
) -> DecodePlan:
    """Lay out the work of rows at `positions` in `slots` (int32 [R]) in the memory of `plan`.

    A row at position -1 has none: it is not attended and writes nothing. Such rows come last.
    """
    n_rows = positions.shape[0]
    n_programs = shape.programs(n_rows)
    launch(_plan_kernel, (triton.cdiv(n_programs, _PLANNED),))(
        positions,
        slots,
        plan.ends,
        plan.shares,
        n_rows,
        n_programs,
        N_KV=shape.n_kv_heads,
        BLOCK=shape.tuning(n_rows).block,
        WINDOW=window or 0,
        ROWS=triton.next_power_of_2(shape.max_rows),
        CHUNK=_PLANNED,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return DecodePlan(plan.ends[: n_rows + 1], plan.shares[:n_programs])


@triton.jit
def _merge(
    out: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    masses: tl.tensor,
    start: tl.tensor,
    n_blocks: tl.tensor,
    per: tl.tensor,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Adds up the parts of units [start, start + n_blocks), in order, into out [GROUP, DIM]."""
    g = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, DIM_PADDED)
    peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_PADDED], tl.float32)
    total = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    first = start // per
    last = (start + n_blocks - 1) // per
    for at in range(first, last + 1, WIDE):
        program = at + tl.arange(0, WIDE)
        live = program <= last
        # A program has at most two partial heads: its first unit's, and another it ends in.
        part = 2 * program + (program * per < start).to(tl.int32)
        cell = part[:, None] * GROUP_PADDED + g[None, :]
        there = live[:, None] & (g < GROUP)[None, :]
        p = tl.load(peaks + cell, mask=there, other=float("-inf"), cache_modifier=".cg")
        m = tl.load(masses + cell, mask=there, other=0.0, cache_modifier=".cg")
        s = tl.load(
            sums + cell[:, :, None] * DIM_PADDED + d[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        highest = tl.maximum(peak, tl.max(p, axis=0))
        highest = tl.where(g < GROUP, highest, 0.0)
        weight = tl.exp2(p - highest[None, :])
        old = tl.exp2(peak - highest)
        mass = mass * old + tl.sum(m * weight, axis=0)
        total = total * old[:, None] + tl.sum(s * weight[:, :, None], axis=0)
        peak = highest
    mass = tl.where(g < GROUP, mass, 1.0)
    value = (total / mass[:, None]).to(out.dtype.element_ty)
    there = (g < GROUP)[:, None] & (d < DIM)[None, :]
    tl.store(out + g[:, None] * DIM + d[None, :], value, mask=there)


@triton.jit
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    block: tl.tensor,
    position: tl.tensor,
    peak: tl.tensor,
    mass: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """One step of the online softmax over the keys before `position`.

    Keys and dimensions are the wide side of the matrix units, which take 16 of one side and 8 of
    the other: the few queries of a head are padded to 8, and `total` is [DIM_PADDED, QUERIES].
    """
    key = block * BLOCK + tl.arange(0, BLOCK)
    seen = key < position
    if WINDOW:
        seen = seen & (key > position - WINDOW)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
    scores = tl.where(seen[:, None], scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, axis=0))
    old = tl.exp2(peak - highest)
    weights = tl.exp2(scores - highest[None, :])
    mass = mass * old + tl.sum(weights, axis=0)
    total = tl.dot(tl.trans(v), weights.to(v.dtype), total * old[None, :], input_precision="ieee")
    return highest, mass, total


@triton.jit
def _new_position(
    qkv: tl.tensor, place: tl.tensor, q_gains: tl.tensor, k_gains: tl.tensor, angles: tl.tensor,
    head: tl.tensor, fresh: tl.tensor, eps: tl.tensor,
    N_KV: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Queries, key and value of a row's new position; if `fresh`, the latter go to the pages."""
    g = tl.arange(0, QUERIES)
    d = tl.arange(0, DIM_PADDED)
    one = tl.arange(0, 1)[:, None]
    places = qkv + (head * GROUP + g)[:, None] * DIM
    q, q_other = load_heads(places, (g < GROUP)[:, None], DIM, DIM_PADDED, ROPE)
    places = qkv + (GROUP * N_KV + head) * DIM + one
    k, k_other = load_heads(places, one == 0, DIM, DIM_PADDED, ROPE)
    places = qkv + ((GROUP + 1) * N_KV + head) * DIM + d[None, :]
    v = tl.load(places, mask=(d < DIM)[None, :], other=0.0).to(place.dtype.element_ty)
    q = turn_heads(
        q, q_other, q_gains[0], q_gains[1], angles[0], angles[1], eps, DIM, NORM, ROPE
    )  # fmt: skip
    k = turn_heads(
        k, k_other, k_gains[0], k_gains[1], angles[0], angles[1], eps, DIM, NORM, ROPE
    )  # fmt: skip
    q = q.to(place.dtype.element_ty)
    k = k.to(place.dtype.element_ty)
    tl.store(place + d[None, :], k, mask=(d < DIM)[None, :] & fresh)
    tl.store(place + N_KV * PAGE * DIM + d[None, :], v, mask=(d < DIM)[None, :] & fresh)
    return q, k, v


@triton.jit
def _leave_part(
    out: tl.tensor, sums: tl.tensor, peaks: tl.tensor, masses: tl.tensor, counter: tl.tensor,
    peak: tl.tensor, mass: tl.tensor, total: tl.tensor,
    part: tl.tensor, start: tl.tensor, n_blocks: tl.tensor, per: tl.tensor,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of a head's keys to scratch; the last to arrive merges all parts into `out`."""
    g = tl.arange(0, QUERIES)
    d = tl.arange(0, DIM_PADDED)
    cell = part * GROUP_PADDED + g
    tl.store(peaks + cell, peak, mask=g < GROUP)
    tl.store(masses + cell, mass, mask=g < GROUP)
    tl.store(sums + cell[None, :] * DIM_PADDED + d[:, None], total, mask=(g < GROUP)[None, :])
    tl.debug_barrier()  # every thread's stores come before the one thread's release below
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == (start + n_blocks - 1) // per - start // per:
        _merge(
            out, sums, peaks, masses, start, n_blocks, per,
            DIM, DIM_PADDED, GROUP, GROUP_PADDED, WIDE,
        )  # fmt: skip
        tl.store(counter, 0)


@triton.jit
def _share_of(shares: tl.tensor, program: tl.tensor) -> tl.tensor:
    """What the plan says of a program: see `DecodePlan.shares`."""
    share = shares + 8 * program
    row = tl.load(share)
    before = tl.load(share + 1)
    after = tl.load(share + 2)
    position = tl.load(share + 3)
    slot = tl.load(share + 4)
    per = tl.load(share + 5)
    stop = tl.load(share + 6)
    return row, before, after, position, slot, per, stop


@triton.jit
def _row_after(
    ends: tl.tensor, positions: tl.tensor, slots: tl.tensor, row: tl.tensor, done: tl.tensor,
    n_rows: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The next row if this one is done, else this one: where its units are, position, slot."""
    row = tl.minimum(row + done.to(tl.int32), n_rows - 1)
    before = tl.load(ends + row)
    after = tl.load(ends + row + 1)
    return row, before, after, tl.load(positions + row), tl.load(slots + row)


@triton.jit
def _own_part(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, fresh: tl.tensor, scale: tl.tensor,
    QUERIES: tl.constexpr, DIM_PADDED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Maximum, denominator and sum over the new position alone; if it is not `fresh`, of none."""
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
    peak = tl.where(fresh, own, float("-inf"))
    mass = tl.zeros([QUERIES], tl.float32) + tl.where(fresh, 1.0, 0.0)
    total = tl.zeros([DIM_PADDED, QUERIES], tl.float32)
    total += tl.where(fresh, tl.trans(v).to(tl.float32), 0.0)
    return peak, mass, total


@triton.jit
def _store_whole(
    out: tl.tensor, mass: tl.tensor, total: tl.tensor,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
) -> None:  # fmt: skip
    """A head whose keys were all in one share."""
    g = tl.arange(0, QUERIES)
    d = tl.arange(0, DIM_PADDED)
    value = (total / mass[None, :]).to(out.dtype.element_ty)
    there = (g < GROUP)[None, :] & (d < DIM)[:, None]
    tl.store(out + g[None, :] * DIM + d[:, None], value, mask=there)


@triton.jit(do_not_specialize=["n_rows", "table_stride"])
def _decode_kernel(
    qkv: tl.tensor, out: tl.tensor, pages: tl.tensor, tables: tl.tensor, slots: tl.tensor,
    positions: tl.tensor, ends: tl.tensor, shares: tl.tensor, q_weight: tl.tensor,
    k_weight: tl.tensor, cosines: tl.tensor, sines: tl.tensor, sums: tl.tensor, peaks: tl.tensor,
    masses: tl.tensor, counters: tl.tensor, n_rows: tl.tensor, table_stride: tl.tensor,
    scale: tl.tensor, eps: tl.tensor,
    N_KV: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, QUERIES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    # Until `wait_for_inputs`, nothing is touched that the kernel before this one writes or reads:
    # the plan and the earlier keys are older than that.
    program = tl.program_id(0)
    row, before, after, position, slot, per, stop = _share_of(shares, program)
    at = program * per
    while at < stop:
        n_blocks = (after - before) // N_KV
        head = (at - before) // n_blocks
        start = before + head * n_blocks
        here = tl.minimum(stop, start + n_blocks)
        table = tables + slot.to(tl.int64) * table_stride
        begin = 0
        if WINDOW:
            begin = tl.maximum(position + 1 - WINDOW, 0) // BLOCK
        first = begin + at - start
        last = begin + here - start
        frames = frames_of(table, first, position, PAGE, BLOCK)
        next_row, next_before, next_after, next_position, next_slot = _row_after(
            ends, positions, slots, row, here == after, n_rows
        )
        own_frame = tl.load(table + position // PAGE).to(tl.int64)
        if AHEAD:
            k, v = load_keys(
                pages, frames, first, head, position, DIM, DIM_PADDED, N_KV, PAGE, BLOCK, False
            )
            frames = frames_of(table, tl.minimum(first + 1, last - 1), position, PAGE, BLOCK)
        q_gains = load_gains(q_weight, DIM, DIM_PADDED, NORM)
        k_gains = load_gains(k_weight, DIM, DIM_PADDED, NORM)
        angles = load_angles(cosines, sines, position, DIM, DIM_PADDED, ROPE)
        wait_for_inputs(PDL)
        release_next(PDL)
        # The new position's key and value are the last of the row, and come from registers.
        fresh = here == start + n_blocks
        q, own_k, own_v = _new_position(
            qkv + row.to(tl.int64) * ((GROUP + 2) * N_KV * DIM),
            pages + (own_frame * (2 * N_KV) + head) * (PAGE * DIM) + (position % PAGE) * DIM,
            q_gains, k_gains, angles, head, fresh, eps,
            N_KV, DIM, DIM_PADDED, GROUP, QUERIES, PAGE, NORM, ROPE,
        )  # fmt: skip
        peak, mass, total = _own_part(q, own_k, own_v, fresh, scale, QUERIES, DIM_PADDED)
        if AHEAD:
            peak, mass, total = _attend(
                q, k, v, first, position, peak, mass, total, scale, BLOCK, WINDOW
            )
        for block in range(first + AHEAD, last):
            k, v = load_keys(
                pages, frames, block, head, position, DIM, DIM_PADDED, N_KV, PAGE, BLOCK, False
            )
            frames = frames_of(table, tl.minimum(block + 1, last - 1), position, PAGE, BLOCK)
            peak, mass, total = _attend(
                q, k, v, block, position, peak, mass, total, scale, BLOCK, WINDOW
            )
        target = out + row.to(tl.int64) * (GROUP * N_KV * DIM) + head * (GROUP * DIM)
        if here - at == n_blocks:
            _store_whole(target, mass, total, DIM, DIM_PADDED, GROUP, QUERIES)
        else:
            _leave_part(
                target, sums, peaks, masses, counters + row * N_KV + head, peak, mass, total,
                2 * program + (at != program * per).to(tl.int32), start, n_blocks, per,
                DIM, DIM_PADDED, GROUP, GROUP_PADDED, QUERIES, WIDE,
            )  # fmt: skip
        at, row, before, after = here, next_row, next_before, next_after
        position, slot = next_position, next_slot
    wait_for_inputs(PDL)
    release_next(PDL)


def decode_attention(
    shape: DecodeShape,
    qkv: Tensor,
    out: Tensor,
    pages: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    plan: DecodePlan,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    window: int | None = None,
    pdl: bool = False,
) -> None:
    """Write the new K and V of each row, and its attention into `out`.

    qkv: [R, (n_heads + 2 * n_kv_heads) * head_dim], before norm and rope.
    out: [R, n_heads * head_dim]; rows at position -1 are left alone.
    pages: one layer, [n_pages, 2 * n_kv_heads, page_size, head_dim].
    tables: int32 [slots, pages], contiguous; slots, positions: int32 [R].
    plan: from `plan_decode` with the same rows and window.
    rope: cosines and sines, float32 [positions, head_dim // 2]; None: no rope.
    """
    s, tuning = shape, shape.tuning(len(positions))
    cosines, sines = rope if rope is not None else (qkv, qkv)
    launch(_decode_kernel, (len(plan.shares),))(
        qkv, out, pages, tables, slots, positions, plan.ends, plan.shares,
        q_weight if q_weight is not None else qkv, k_weight if k_weight is not None else qkv,
        cosines, sines, s.sums, s.peaks, s.masses, s.counters,
        positions.shape[0], tables.stride(0), s.head_dim**-0.5 * 1.4426950408889634, eps,
        N_KV=s.n_kv_heads,
        DIM=s.head_dim,
        DIM_PADDED=s.dim_padded,
        GROUP=s.group,
        GROUP_PADDED=s.group_padded,
        QUERIES=max(8, s.group_padded),
        PAGE=s.page_size,
        BLOCK=tuning.block,
        WINDOW=window or 0,
        NORM=q_weight is not None,
        ROPE=rope is not None,
        WIDE=_WIDE,
        AHEAD=int(tuning.ahead),
        PDL=pdl,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        launch_pdl=pdl,
    )  # fmt: skip
