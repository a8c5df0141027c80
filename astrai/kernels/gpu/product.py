"""Products of a weight with 2 to some hundreds of rows, which launch early and do what follows.

A program owns a tile of the output or, with `split`, a share of the sum over K of a tile: so a
weight of few rows has work for every multiprocessor too. Shares are left as float32 parts, which
`add_norm` adds up in order, onto the residual stream, and norms for the product after it:

    normed ─► product ─────────► qkv ─► attention ─► product ─► parts ─► add_norm ─► normed
    normed ─► product and SiLU ─► acted ───────────► product ─► parts ─► add_norm ─► normed
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import release_next, wait_for_inputs
from astrai.kernels.gpu.launch import launch

# Past this many rows the library's products are faster.
MOST_ROWS = 256
# Weights of which both sides are at least this, or of so many numbers (a head): the library's are
# faster past 64 rows.
_LARGE, _LARGE_HEAD = 4096, 1 << 26
# Programs that share sums until there are this many: one for about every multiprocessor.
_PROGRAMS = 128


class Tile(NamedTuple):
    """How one product runs."""

    rows: int  # of x, per program
    columns: int  # of the output, per program
    step: int  # of the sum, at once
    split: int  # programs that share one sum
    warps: int
    stages: int
    swap: bool  # x is the narrow side of the matrix units: they take 64 of the other at least


def tile_of(n_rows: int, n: int, k: int, silu: bool = False, parts: bool = False) -> Tile | None:
    """What measured fastest for n_rows of x and a weight [n, k] ([2 n, k] with SiLU).

    None: a product of the library is faster. `parts`: sums may be shared.
    """
    plain = not (silu or parts)
    if (
        n_rows > MOST_ROWS
        or (n_rows > 64 and (min(n, k) >= _LARGE or (plain and n * k >= _LARGE_HEAD)))
        or (n_rows > 128 and plain and n * k > 1 << 22)
    ):
        return None
    tile = _gated_tile(n_rows, n, k) if silu else _plain_tile(n_rows, n, k)
    split = 1
    if parts:
        programs = triton.cdiv(n, tile.columns) * triton.cdiv(n_rows, tile.rows)
        while programs * split * 2 <= _PROGRAMS and split < 8 and 4 * split * tile.step <= k:
            split *= 2
    return tile._replace(split=split)


def _plain_tile(n_rows: int, n: int, k: int) -> Tile:
    large = n * k > 1 << 23
    if n_rows <= 32:
        return Tile(16 if n_rows <= 16 else 32, 64, 128, 1, 4, 5, swap=True)
    if n_rows <= 64:
        return Tile(64, 64 if large else 32, 128, 1, 4, 5, swap=False)
    if n_rows <= 128:
        return Tile(128 if large else 64, 64, 128, 1, 4, 4, swap=False)
    return Tile(128, 64, 64, 1, 8, 6, swap=False)


def _gated_tile(n_rows: int, n: int, k: int) -> Tile:
    large = n * k > 1 << 23
    if n_rows <= 32:
        return Tile(16 if n_rows <= 16 else 32, 64, 128, 1, 4, 4, swap=True)
    if n_rows <= 64:
        return Tile(64, 64 if large else 32, 128, 1, 4, 4, swap=False)
    if n_rows <= 128:
        return Tile(128, 64, 128, 1, 8, 3, False) if large else Tile(64, 64, 64, 1, 4, 4, False)
    return Tile(128, 128 if large else 64, 64, 1, 8, 4, swap=False)


def part_numbers(n: int, k: int) -> int:
    """float32 numbers that the parts of a weight [n, k] need, whatever the rows."""
    tiles = ((m, tile_of(m, n, k, parts=True)) for m in range(1, MOST_ROWS + 1))
    return max(m * n * tile.split for m, tile in tiles if tile is not None)


@triton.jit
def _load_step(
    row: tl.tensor, live: tl.tensor, k: tl.tensor, K: tl.tensor,
    WHOLE: tl.constexpr, EVEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Columns `k` of the rows at pointers `row`; 0 past K and for rows that are not live."""
    place = row[:, None] + k[None, :]
    if WHOLE and EVEN:
        step = tl.load(place)
    elif EVEN:
        step = tl.load(place, mask=live[:, None], other=0.0)
    else:
        step = tl.load(place, mask=live[:, None] & (k < K)[None, :], other=0.0)
    return step


@triton.jit
def _multiply(a: tl.tensor, b: tl.tensor, total: tl.tensor, SWAP: tl.constexpr) -> tl.tensor:
    """total + a @ bᵀ, or its transpose."""
    if SWAP:
        total = tl.dot(b, tl.trans(a), total, input_precision="ieee")
    else:
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["n_rows"])
def _product_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, n_rows: tl.tensor,
    N: tl.tensor, K: tl.tensor, share: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, PARTS: tl.constexpr, SWAP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    k = part * share + tl.arange(0, STEP)
    # Rows past the edge are not read: thousands of reads of one line would queue for it.
    live = m < n_rows
    inside = n < N
    x_row = x + m.to(tl.int64) * K
    w_row = weight + n.to(tl.int64) * K
    u_row = w_row + N.to(tl.int64) * K  # the rows of `up` follow those of `gate`
    total = tl.zeros([COLUMNS if SWAP else ROWS, ROWS if SWAP else COLUMNS], tl.float32)
    ups = total
    wait_for_inputs(PDL)
    release_next(PDL)
    for _ in range(0, share, STEP):
        a = _load_step(x_row, live, k, K, WHOLE_ROWS, EVEN)
        b = _load_step(w_row, inside, k, K, WHOLE_COLUMNS, EVEN)
        total = _multiply(a, b, total, SWAP)
        if SILU:
            b = _load_step(u_row, inside, k, K, WHOLE_COLUMNS, EVEN)
            ups = _multiply(a, b, ups, SWAP)
        k += STEP
    if SWAP:
        total = tl.trans(total)
        ups = tl.trans(ups)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SILU:
            ups += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * ups
    row = m.to(tl.int64)
    if PARTS:
        row += part.to(tl.int64) * n_rows
    there = live[:, None] & inside[None, :]
    tl.store(out + row[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=there)


def product(
    x: Tensor, weight: Tensor, out: Tensor, tile: Tile, *,
    bias: Tensor | None = None, silu: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """out [R, N] = x [R, K] @ weight [N, K]ᵀ + bias; or float32 parts [split, R, N] of it.

    silu: weight and bias have 2 N rows, gate then up, and out is silu(gate) * up.
    """
    n_rows, k = x.shape
    n, parts = out.shape[-1], out.dim() == 3
    if (out.shape[0] if parts else 1) != tile.split or (parts and (silu or bias is not None)):
        raise ValueError(f"{tuple(out.shape) = }, {tile.split = }, {silu = }, expected equal parts")
    share = triton.cdiv(k, tile.step * tile.split) * tile.step
    grid = (triton.cdiv(n, tile.columns), triton.cdiv(n_rows, tile.rows), tile.split)
    launch(_product_kernel, grid)(
        x, weight, bias if bias is not None else x, out, n_rows, n, k, share,
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step,
        WHOLE_ROWS=n_rows % tile.rows == 0, WHOLE_COLUMNS=n % tile.columns == 0,
        EVEN=share * tile.split == k,
        BIAS=bias is not None, SILU=silu, PARTS=parts, SWAP=tile.swap, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _add_norm_kernel(
    parts: tl.tensor, bias: tl.tensor, hidden: tl.tensor, gain: tl.tensor, out: tl.tensor,
    n_rows: tl.tensor, eps: tl.tensor,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    release_next(PDL)
    place = hidden + row * SIZE + column
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(SPLIT):
        at = (part * n_rows + row) * SIZE + column
        value += tl.load(parts + at, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    kept = value.to(hidden.dtype.element_ty)
    tl.store(place, kept, mask=inside)
    value = kept.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    tl.store(out + row * SIZE + column, (value * rstd * g).to(out.dtype.element_ty), mask=inside)


def add_norm(
    parts: Tensor, hidden: Tensor, gain: Tensor, out: Tensor, eps: float, *,
    bias: Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """hidden += parts.sum(0) + bias; out = norm(hidden) * gain. parts: float32 [split, R, size]."""
    n_rows, size = hidden.shape
    padded = triton.next_power_of_2(size)
    launch(_add_norm_kernel, (n_rows,))(
        parts, bias if bias is not None else gain, hidden, gain, out, n_rows, eps,
        SIZE=size, PADDED=padded, SPLIT=parts.shape[0], BIAS=bias is not None, PDL=pdl,
        num_warps=4 if padded <= 2048 else 8, launch_pdl=pdl,
    )  # fmt: skip
