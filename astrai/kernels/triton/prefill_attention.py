"""Ragged prefill: q/k norm, rope and KV write, then causal attention through the page tables.

A tile is up to `TILE` rows of one entry. The keys of its earlier chunks, of a shared prefix and of
the tile itself are all read from the pages, which the first kernel has filled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.triton.heads import (
    frames_of,
    load_angles,
    load_gains,
    load_heads,
    load_keys,
    turn_heads,
)
from astrai.kernels.triton.launch import launch

# Query rows of one tile; `tiles` int32 [n_tiles, 4] holds (first row, first position, rows, slot).
TILE = 64
# Heads that one program of the writing kernel turns.
_HEADS = 8


@triton.jit(do_not_specialize=["table_stride"])
def _write_kernel(
    qkv: tl.tensor,
    q_out: tl.tensor,
    pages: tl.tensor,
    tables: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    table_stride: tl.tensor,
    eps: tl.tensor,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, DIM_PADDED)
    inside = (d < DIM)[None, :]
    source = qkv + row * ((N_HEADS + 2 * N_KV) * DIM)
    cosine, sine = load_angles(cosines, sines, tl.maximum(position, 0), DIM, DIM_PADDED, ROPE)
    if tl.program_id(1) * HEADS < N_HEADS:
        live = (h < N_HEADS)[:, None]
        there = live & inside
        gain, other_gain = load_gains(q_weight, DIM, DIM_PADDED, NORM)
        q, other = load_heads(source + h[:, None] * DIM, live, DIM, DIM_PADDED, ROPE)
        q = turn_heads(q, other, gain, other_gain, cosine, sine, eps, DIM, NORM, ROPE)
        target = q_out + row * (N_HEADS * DIM) + h[:, None] * DIM + d[None, :]
        tl.store(target, q.to(q_out.dtype.element_ty), mask=there)
    if (tl.program_id(1) * HEADS < N_KV) & (position >= 0):
        live = (h < N_KV)[:, None]
        there = live & inside
        slot = tl.load(slots + row).to(tl.int64)
        frame = tl.load(tables + slot * table_stride + position // PAGE).to(tl.int64)
        at = (frame * (2 * N_KV) + h) * (PAGE * DIM) + (position % PAGE) * DIM
        gain, other_gain = load_gains(k_weight, DIM, DIM_PADDED, NORM)
        places = source + (N_HEADS + h)[:, None] * DIM
        k, other = load_heads(places, live, DIM, DIM_PADDED, ROPE)
        k = turn_heads(k, other, gain, other_gain, cosine, sine, eps, DIM, NORM, ROPE)
        v = tl.load(source + (N_HEADS + N_KV + h)[:, None] * DIM + d[None, :], mask=there)
        target = pages + at[:, None] + d[None, :]
        tl.store(target, k.to(pages.dtype.element_ty), mask=there)
        tl.store(target + N_KV * PAGE * DIM, v.to(pages.dtype.element_ty), mask=there)


def write_keys(
    qkv: Tensor,
    q_out: Tensor,
    pages: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Norm and rope of q into q_out [T, n_heads * head_dim], K and V into the pages.

    qkv: [T, (n_heads + 2 * n_kv_heads) * head_dim]; slots, positions: int32 [T]; a row at
    position -1 writes nothing. See `decode_attention` for the others.
    """
    n_kv, page, dim = pages.shape[1] // 2, pages.shape[2], pages.shape[3]
    n_heads = q_out.shape[1] // dim
    cosines, sines = rope if rope is not None else (qkv, qkv)
    heads = min(_HEADS, triton.next_power_of_2(n_heads))
    launch(_write_kernel, (qkv.shape[0], triton.cdiv(n_heads, heads)))(
        qkv,
        q_out,
        pages,
        tables,
        slots,
        positions,
        q_weight if q_weight is not None else qkv,
        k_weight if k_weight is not None else qkv,
        cosines,
        sines,
        tables.stride(0),
        eps,
        N_HEADS=n_heads,
        N_KV=n_kv,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        HEADS=heads,
        PAGE=page,
        NORM=q_weight is not None,
        ROPE=rope is not None,
        num_warps=4,
    )


@triton.jit
def _attend(
    queries: tl.tensor, k: tl.tensor, v: tl.tensor, position: tl.tensor, block: tl.tensor,
    peak: tl.tensor, mass: tl.tensor, total: tl.tensor, scale: tl.tensor,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One step of the online softmax; EDGE: not every row sees every key of the block."""
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
    if EDGE:
        key = block * BLOCK + tl.arange(0, BLOCK)
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, axis=1))
    old = tl.exp2(peak - highest)
    weights = tl.exp2(scores - highest[:, None])
    mass = mass * old + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(v.dtype), v, total * old[:, None], input_precision="ieee")
    return highest, mass, total


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q: tl.tensor,
    out: tl.tensor,
    pages: tl.tensor,
    tables: tl.tensor,
    tiles: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    tile = tiles + 4 * tl.program_id(0)
    first_row = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    table = tables + tl.load(tile + 3).to(tl.int64) * table_stride
    head = tl.program_id(1)
    kv_head = head // (N_HEADS // N_KV)
    i = tl.arange(0, TILE)
    d = tl.arange(0, DIM_PADDED)
    inside = (i < count)[:, None] & (d < DIM)[None, :]
    at = (first_row + i)[:, None] * (N_HEADS * DIM) + head * DIM + d[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    position = first + i
    peak = tl.full([TILE], -1.0e30, tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE, DIM_PADDED], tl.float32)
    if WINDOW:
        edge = tl.maximum(first + 1 - WINDOW, 0) // BLOCK
    else:
        seen = first + 1  # by every row
        edge = seen // BLOCK
        for block in range(0, edge):
            frames = frames_of(table, block, seen, PAGE, BLOCK)
            k, v = load_keys(
                pages, frames, block, kv_head, seen, DIM, DIM_PADDED, N_KV, PAGE, BLOCK, True
            )
            peak, mass, total = _attend(
                queries, k, v, position, block, peak, mass, total, scale, BLOCK, WINDOW, False
            )
    stop = first + count
    for block in range(edge, tl.cdiv(stop, BLOCK)):
        frames = frames_of(table, block, stop, PAGE, BLOCK)
        k, v = load_keys(
            pages, frames, block, kv_head, stop, DIM, DIM_PADDED, N_KV, PAGE, BLOCK, False
        )
        peak, mass, total = _attend(
            queries, k, v, position, block, peak, mass, total, scale, BLOCK, WINDOW, True
        )
    mass = tl.where(i < count, mass, 1.0)
    tl.store(out + at, (total / mass[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    q: Tensor,
    out: Tensor,
    pages: Tensor,
    tables: Tensor,
    tiles: Tensor,
    n_tiles: int,
    *,
    window: int | None = None,
    block: int = 64,
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Causal attention of every row over its entry's keys in the pages.

    q, out: [T, n_heads * head_dim], q after norm and rope; tiles: int32 [>= n_tiles, 4], a tile
    of 0 rows does nothing.
    """
    n_kv, page, dim = pages.shape[1] // 2, pages.shape[2], pages.shape[3]
    n_heads = q.shape[1] // dim
    if dim > 128:
        block = min(block, 32)
    launch(_prefill_kernel, (n_tiles, n_heads))(
        q,
        out,
        pages,
        tables,
        tiles,
        tables.stride(0),
        dim**-0.5 * 1.4426950408889634,
        N_HEADS=n_heads,
        N_KV=n_kv,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        PAGE=page,
        TILE=TILE,
        BLOCK=block,
        WINDOW=window or 0,
        num_warps=warps,
        num_stages=stages,
    )
