"""Attention of one position's heads over its pages, as compiled code: no gather, no mask, no copy.

A unit of work is one row and one KV head. Its keys are read where they lie, page by page, in the
order of their positions: scores of the query heads that share the KV head, their softmax over all
keys, then the weighted values. A row's bits depend on nothing but its own queries and keys, and
prefill and decode run the same code. Threads share units, never a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, from_dtype, njit, types

from astrai.kernels.cpu.keep import kept, sources
from astrai.kernels.cpu.lanes import (
    LANES,
    add,
    dots16,
    dots64,
    fma,
    larger,
    load,
    load_int,
    load_one,
    mul,
    prefetch,
    short_dots16,
    short_dots64,
    splat,
    store,
    store_one,
    ticket,
    total,
)
from astrai.kernels.cpu.numbers import INLINE, LOG2_E, exp2, read, write

# What a launch is told. Addresses; strides and sizes in bytes; a stride is from row to row.
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            "q", "q_stride", "k", "k_stride", "v", "v_stride", "out",
            "pages",  # of one layer: [n_pages, 2 * n_kv_heads, page_size, head_dim]
            "n_rows", "n_kv_heads", "share", "head_dim", "page_size", "size",
            "window",  # positions that a row sees, itself included; 0: all
            "positions", "first_pages",  # int64 [n_rows] each; the latter are places in `tables`
            "tables",  # int64: the frames of each task, one task after the other
            "scratch", "scratch_size",  # of each thread: see `scratch_bytes`
            "threads", "units",  # counters: how many threads have come, how many units are taken
        )
    ]
)  # fmt: skip
_Call = from_dtype(CALL)


def scratch_bytes(share: int, head_dim: int, n_positions: int) -> int:
    """float32: of a unit's heads queries, sums, masses, and scores of so many positions."""
    return 4 * share * (2 * head_dim + LANES + n_positions + 3 * LANES)


@njit(**INLINE)
def _copy(source: int, target: int, n: int, size: int) -> None:
    for i in range(0, n * size, LANES * size):
        write(target + i, size, read(source + i, size))


@njit(**INLINE)
def _page(call: Any, table: int, i: int, lane: int) -> int:
    """Where a page of a table lies; lane: a head's keys or, after all heads', its values."""
    per_page = call.page_size * call.head_dim * call.size
    return call.pages + (load_int(table + 8 * i) * 2 * call.n_kv_heads + lane) * per_page


@njit(**INLINE)
def _prefetch(address: int, n_bytes: int) -> None:
    for line in range(0, n_bytes, 64):
        prefetch(address + line)


@njit(**INLINE)
def _score(q: int, keys: int, n: int, dim: int, size: int, scores: int) -> None:
    """Products of q, float32 [dim], with n keys in a row; and of some after them, up to 16."""
    step = dim * size
    for j in range(0, n, LANES):
        at = keys + j * step
        sums = splat(np.float32(0.0))
        whole = dim // 64 * 64
        for d in range(0, whole, 64):
            if size == 2:
                sums = add(sums, short_dots64(q + 4 * d, at + size * d, step))
            else:
                sums = add(sums, dots64(q + 4 * d, at + size * d, step))
        for d in range(whole, dim, LANES):
            if size == 2:
                sums = add(sums, short_dots16(q + 4 * d, at + size * d, step))
            else:
                sums = add(sums, dots16(q + 4 * d, at + size * d, step))
        store(scores + 4 * j, sums)


@njit(**INLINE)
def _soften(scores: int, begin: int, end: int, scale: float) -> float:
    """Scores [begin, end) become exp(scale * score - largest), those around them 0; their sum."""
    n = (end + LANES - 1) // LANES * LANES
    for j in range(begin):
        store_one(scores + 4 * j, np.float32(-np.inf))
    for j in range(end, n):
        store_one(scores + 4 * j, np.float32(-np.inf))
    tops = load(scores)
    for j in range(LANES, n, LANES):
        tops = larger(tops, load(scores + 4 * j))
    store(scores + 4 * n, tops)
    top = load_one(scores + 4 * n)
    for i in range(1, LANES):
        x = load_one(scores + 4 * (n + i))
        top = x if x > top else top
    factor, shift = splat(scale), splat(-scale * top)
    mass = splat(np.float32(0.0))
    for j in range(0, n, LANES):
        e = exp2(fma(load(scores + 4 * j), factor, shift))
        store(scores + 4 * j, e)
        mass = add(mass, e)
    return total(mass)


@njit(**INLINE)
def _weigh(weights: int, values: int, n: int, dim: int, size: int, sums: int) -> None:
    """sums, float32 [dim], plus weights [n] times n values in a row, one after the other."""
    whole = dim // 64 * 64
    for d in range(0, whole, 64):  # four sums at a time: none waits for itself
        a0, a1 = load(sums + 4 * d), load(sums + 4 * d + 64)
        a2, a3 = load(sums + 4 * d + 128), load(sums + 4 * d + 192)
        for j in range(n):
            w, at = splat(load_one(weights + 4 * j)), values + (j * dim + d) * size
            a0, a1 = fma(w, read(at, size), a0), fma(w, read(at + 16 * size, size), a1)
            a2, a3 = fma(w, read(at + 32 * size, size), a2), fma(w, read(at + 48 * size, size), a3)
        store(sums + 4 * d, a0)
        store(sums + 4 * d + 64, a1)
        store(sums + 4 * d + 128, a2)
        store(sums + 4 * d + 192, a3)
    for d in range(whole, dim, LANES):
        a0 = load(sums + 4 * d)
        for j in range(n):
            value = read(values + (j * dim + d) * size, size)
            a0 = fma(splat(load_one(weights + 4 * j)), value, a0)
        store(sums + 4 * d, a0)


@njit(**INLINE)
def _weigh_pair(
    weights: int, stride: int, values: int, n: int, dim: int, size: int, sums: int
) -> None:
    """`_weigh` of two heads and 64 numbers at a time: values are read once for eight sums."""
    others = sums + 4 * dim
    for d in range(0, dim, 64):
        a0, b0 = load(sums + 4 * d), load(others + 4 * d)
        a1, b1 = load(sums + 4 * d + 64), load(others + 4 * d + 64)
        a2, b2 = load(sums + 4 * d + 128), load(others + 4 * d + 128)
        a3, b3 = load(sums + 4 * d + 192), load(others + 4 * d + 192)
        for j in range(n):
            a, b = splat(load_one(weights + 4 * j)), splat(load_one(weights + stride + 4 * j))
            at = values + (j * dim + d) * size
            v0, v1 = read(at, size), read(at + 16 * size, size)
            v2, v3 = read(at + 32 * size, size), read(at + 48 * size, size)
            a0, b0 = fma(a, v0, a0), fma(b, v0, b0)
            a1, b1 = fma(a, v1, a1), fma(b, v1, b1)
            a2, b2 = fma(a, v2, a2), fma(b, v2, b2)
            a3, b3 = fma(a, v3, a3), fma(b, v3, b3)
        store(sums + 4 * d, a0)
        store(sums + 4 * d + 64, a1)
        store(sums + 4 * d + 128, a2)
        store(sums + 4 * d + 192, a3)
        store(others + 4 * d, b0)
        store(others + 4 * d + 64, b1)
        store(others + 4 * d + 128, b2)
        store(others + 4 * d + 192, b3)


@njit(**INLINE)
def _attend(call: Any, row: int, head: int, scratch: int, dim: int, size: int) -> None:
    """One unit of work; scratch as in `scratch_bytes`."""
    share, page = call.share, call.page_size
    position = load_int(call.positions + 8 * row)
    table = call.tables + 8 * load_int(call.first_pages + 8 * row)
    begin = max(0, position - call.window + 1) if call.window else 0
    first, last = begin // page, position // page
    start = first * page
    sums, masses = scratch + 4 * share * dim, scratch + 8 * share * dim
    scores = masses + 4 * share * LANES
    stride = 4 * ((last + 1) * page - start + 2 * LANES)
    queries = call.q + row * call.q_stride + head * share * dim * size
    for d in range(0, share * dim, LANES):
        store(scratch + 4 * d, read(queries + size * d, size))
        store(sums + 4 * d, splat(np.float32(0.0)))
    at = _page(call, table, first, head)
    value_lane = call.n_kv_heads + head
    for i in range(first, last + 1):
        # Pages lie anywhere: nothing but this loop knows which is next.
        following = _page(call, table, first, value_lane)
        if i < last:
            following = _page(call, table, i + 1, head)
        _prefetch(following, page * dim * size)
        n = min(page, position + 1 - i * page)
        for g in range(share):
            of_page = scores + g * stride + 4 * (i * page - start)
            _score(scratch + 4 * g * dim, at, n, dim, size, of_page)
        at = following
    scale = np.float32(LOG2_E / np.sqrt(dim))
    for g in range(share):
        mass = _soften(scores + g * stride, begin - start, position + 1 - start, scale)
        store_one(masses + 4 * g, mass)
    for i in range(first, last + 1):
        following = at
        if i < last:
            following = _page(call, table, i + 1, value_lane)
            _prefetch(following, page * dim * size)
        skip = max(0, begin - i * page)
        n = min(page, position + 1 - i * page) - skip
        weights, values = scores + 4 * (i * page + skip - start), at + skip * dim * size
        pairs = share // 2 * 2 if dim % 64 == 0 else 0
        for g in range(0, pairs, 2):
            _weigh_pair(weights + g * stride, stride, values, n, dim, size, sums + 4 * g * dim)
        for g in range(pairs, share):
            _weigh(weights + g * stride, values, n, dim, size, sums + 4 * g * dim)
        at = following
    out = call.out + (row * call.n_kv_heads + head) * share * dim * size
    for g in range(share):
        share_of_mass = splat(np.float32(1.0) / load_one(masses + 4 * g))
        for d in range(g * dim, (g + 1) * dim, LANES):
            write(out + size * d, size, mul(load(sums + 4 * d), share_of_mass))


@njit(**INLINE)
def _write_rows(call: Any) -> None:
    """K and V of every row into the pages."""
    dim, size, page, heads = call.head_dim, call.size, call.page_size, call.n_kv_heads
    for row in range(call.n_rows):
        position = load_int(call.positions + 8 * row)
        table = call.tables + 8 * load_int(call.first_pages + 8 * row)
        frame = load_int(table + 8 * (position // page))
        for head in range(heads):
            at = (frame * 2 * heads + head) * page + position % page
            key = call.k + row * call.k_stride + head * dim * size
            _copy(key, call.pages + at * dim * size, dim, size)
            value = call.v + row * call.v_stride + head * dim * size
            _copy(value, call.pages + (at + heads * page) * dim * size, dim, size)


@njit(**INLINE)
def _take_units(call: Any, dim: int, size: int) -> None:
    """Units of work until none is left; as many threads as there is scratch may run this."""
    scratch = call.scratch + ticket(call.threads) * call.scratch_size
    # Head by head: the keys of one are in the cache when the next row of a prompt wants them.
    while True:
        unit = ticket(call.units)
        if unit >= call.n_rows * call.n_kv_heads:
            break
        _attend(call, unit % call.n_rows, unit // call.n_rows, scratch, dim, size)


class Compiled(NamedTuple):
    """Functions that take the address of a CALL."""

    write: Any  # one thread, before any attends
    attend: Any  # as many threads as there is scratch for


def _entries(version: int) -> tuple[Callable[..., None], dict[Any, Callable[..., None]]]:
    """What writes; what attends, by head_dim and size, None: any. Closes over `sources`."""

    def write(pointer: Any) -> None:
        _ = version
        _write_rows(carray(pointer, 1)[0])

    def attend(pointer: Any) -> None:
        _ = version
        call = carray(pointer, 1)[0]
        _take_units(call, call.head_dim, call.size)

    def attend_short_64(pointer: Any) -> None:
        _ = version
        _take_units(carray(pointer, 1)[0], 64, 2)

    def attend_short_128(pointer: Any) -> None:
        _ = version
        _take_units(carray(pointer, 1)[0], 128, 2)

    return write, {None: attend, (64, 2): attend_short_64, (128, 2): attend_short_128}


@functools.cache
def compiled(head_dim: int, size: int) -> Compiled:
    """For heads of that many numbers of `size` bytes: 2, bfloat16, or 4, float32."""
    write, attends = _entries(sources())
    signature = types.void(types.CPointer(_Call))
    attend = attends.get((head_dim, size), attends[None])
    return Compiled(kept(signature, write), kept(signature, attend))
