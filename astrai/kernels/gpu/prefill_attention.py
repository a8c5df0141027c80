"""Ragged prefill: K and V to the pages, then causal attention through the page tables.

Each of the two kernels does the norm and rope of what it loads: of K the first, of q the second.
A tile is up to `TILE` rows of one entry. The keys of its earlier chunks, of a shared prefix and of
the tile itself are all read from the pages, which the first kernel has filled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import frames_of, load_keys, load_turned
from astrai.kernels.gpu.launch import launch

# Query rows of one tile; `tiles` int32 [n_tiles, 4] holds (first row, first position, rows, slot).
TILE = 64
# KV heads of one program of the writing kernel, of several rows if a row has fewer; a power of two.
_HEADS = 16


@triton.jit(do_not_specialize=["n_rows", "table_stride"])
def _write_kernel(
    qkv: tl.tensor, pages: tl.tensor, tables: tl.tensor, slots: tl.tensor, positions: tl.tensor,
    k_weight: tl.tensor, cosines: tl.tensor, sines: tl.tensor, n_rows: tl.tensor,
    table_stride: tl.tensor, eps: tl.tensor,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
) -> None:  # fmt: skip
    # The KV heads of all rows, end to end.
    i = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = i // N_KV
    head = i % N_KV
    position = tl.load(positions + row, mask=row < n_rows, other=-1)
    live = position >= 0
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    frame = tl.load(tables + slot * table_stride + position // PAGE, mask=live, other=0)
    at = (frame.to(tl.int64) * (2 * N_KV) + head) * (PAGE * DIM) + (position % PAGE) * DIM
    d = tl.arange(0, DIM_PADDED)[None, :]
    live = live[:, None]
    there = live & (d < DIM)
    source = qkv + row.to(tl.int64) * ((N_HEADS + 2 * N_KV) * DIM) + (N_HEADS + head) * DIM
    source = source[:, None]
    v = tl.load(source + N_KV * DIM + d, mask=there, other=0.0)
    k = load_turned(
        source, live, k_weight, cosines, sines, position[:, None], eps, DIM, DIM_PADDED, NORM, ROPE
    )
    target = pages + at[:, None] + d
    tl.store(target, k.to(pages.dtype.element_ty), mask=there)
    tl.store(target + N_KV * PAGE * DIM, v.to(pages.dtype.element_ty), mask=there)


def write_keys(
    qkv: Tensor,
    pages: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """K, after norm and rope, and V of every row into the pages.

    qkv: [T, (n_heads + 2 * n_kv_heads) * head_dim]; slots, positions: int32 [T]; a row at
    position -1 writes nothing. See `decode_attention` for the others.
    """
    n_kv, page, dim = pages.shape[1] // 2, pages.shape[2], pages.shape[3]
    cosines, sines = rope if rope is not None else (qkv, qkv)
    launch(_write_kernel, (triton.cdiv(qkv.shape[0] * n_kv, _HEADS),))(
        qkv,
        pages,
        tables,
        slots,
        positions,
        k_weight if k_weight is not None else qkv,
        cosines,
        sines,
        qkv.shape[0],
        tables.stride(0),
        eps,
        N_HEADS=qkv.shape[1] // dim - 2 * n_kv,
        N_KV=n_kv,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        PAGE=page,
        HEADS=_HEADS,
        NORM=k_weight is not None,
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
    qkv: tl.tensor, out: tl.tensor, pages: tl.tensor, tables: tl.tensor, tiles: tl.tensor,
    q_weight: tl.tensor, cosines: tl.tensor, sines: tl.tensor, table_stride: tl.tensor,
    scale: tl.tensor, eps: tl.tensor,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr,
) -> None:  # fmt: skip
    tile = tiles + 4 * tl.program_id(0)
    first_row = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    count = tl.load(tile + 2)
    table = tables + tl.load(tile + 3).to(tl.int64) * table_stride
    head = tl.program_id(1)
    kv_head = head // (N_HEADS // N_KV)
    i = tl.arange(0, TILE)
    position = first + i
    row = (first_row + i)[:, None]
    live = (i < count)[:, None]
    places = qkv + row * ((N_HEADS + 2 * N_KV) * DIM) + head * DIM
    q = load_turned(
        places, live, q_weight, cosines, sines, position[:, None], eps, DIM, DIM_PADDED, NORM, ROPE
    )
    d = tl.arange(0, DIM_PADDED)[None, :]
    # The matrix units read from shared memory only what comes straight from a load: anything else
    # Triton copies to registers at every block of keys. So this, which loads nothing.
    queries = tl.load(places + d, mask=live & (count < 0), other=q.to(qkv.dtype.element_ty))
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
    target = out + row * (N_HEADS * DIM) + head * DIM + d
    tl.store(target, (total / mass[:, None]).to(out.dtype.element_ty), mask=live & (d < DIM))


def prefill_attention(
    qkv: Tensor,
    out: Tensor,
    pages: Tensor,
    tables: Tensor,
    tiles: Tensor,
    n_tiles: int,
    *,
    q_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    window: int | None = None,
) -> None:
    """Causal attention of every row over its entry's keys in the pages.

    qkv: [T, (n_heads + 2 * n_kv_heads) * head_dim], of which q is read, before norm and rope.
    out: [T, n_heads * head_dim].
    tiles: int32 [>= n_tiles, 4], a tile of 0 rows does nothing. See `decode_attention` for the
    others.
    """
    n_kv, page, dim = pages.shape[1] // 2, pages.shape[2], pages.shape[3]
    n_heads = out.shape[1] // dim
    cosines, sines = rope if rope is not None else (qkv, qkv)
    launch(_prefill_kernel, (n_tiles, n_heads))(
        qkv,
        out,
        pages,
        tables,
        tiles,
        q_weight if q_weight is not None else qkv,
        cosines,
        sines,
        tables.stride(0),
        dim**-0.5 * 1.4426950408889634,
        eps,
        N_HEADS=n_heads,
        N_KV=n_kv,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        PAGE=page,
        TILE=TILE,
        BLOCK=64 if dim <= 128 else 32,
        WINDOW=window or 0,
        NORM=q_weight is not None,
        ROPE=rope is not None,
        num_warps=4,
        num_stages=2,
    )
