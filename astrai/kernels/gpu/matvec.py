"""Products of a weight with one row, with the norm before and what follows fused in.

For one row the weight's bytes are all the time there is. A program owns ROWS rows of the weight and
reads them whole; its first piece does not depend on the kernel before it and is on its way before
that kernel ends (programmatic dependent launch).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import release_next, wait_for_inputs
from astrai.kernels.gpu.launch import launch


class Tiling(NamedTuple):
    rows: int  # of the weight, per program
    step: int  # columns read at once
    warps: int


def tiling(n: int, k: int) -> Tiling:
    """What measured fastest for a weight of n rows and k columns: whole rows up to 4096 columns."""
    if k <= 1024:
        return Tiling(8, 1024, 8) if n <= 65536 else Tiling(4, 1024, 4)
    if k <= 2048:
        return Tiling(4, 2048, 4) if n <= 4096 else Tiling(8, 2048, 8)
    return Tiling(2 if n >= 2 * k else 4, 4096, 8)


@triton.jit
def _matvec_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, norm_weight: tl.tensor, out: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    SILU: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    row = weight + n.to(tl.int64)[:, None] * K
    live = (n < N)[:, None]
    w = tl.load(row + k[None, :], mask=live & (k < K)[None, :], other=0.0)
    if SILU:  # the rows of `up` follow those of `gate`
        up_row = row + N * K
        u = tl.load(up_row + k[None, :], mask=live & (k < K)[None, :], other=0.0)
    if NORM:
        gain = tl.load(norm_weight + k, mask=k < K, other=0.0)
    wait_for_inputs(PDL)
    release_next(PDL)
    # All loads before the first sum, so that their latencies overlap.
    piece = tl.load(x + k, mask=k < K, other=0.0)
    if ADD:
        base = tl.load(out + n, mask=n < N, other=0.0)
    if NORM:
        full = tl.arange(0, K_PADDED)
        whole = tl.load(x + full, mask=full < K, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(whole * whole, axis=0) / K + eps)
    total = tl.zeros([ROWS], tl.float32)
    ups = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, K, STEP):
        at = start + k
        if start > 0:
            w = tl.load(row + at[None, :], mask=live & (at < K)[None, :], other=0.0)
            piece = tl.load(x + at, mask=at < K, other=0.0)
            if SILU:
                u = tl.load(up_row + at[None, :], mask=live & (at < K)[None, :], other=0.0)
            if NORM:
                gain = tl.load(norm_weight + at, mask=at < K, other=0.0)
        piece = piece.to(tl.float32)
        if NORM:
            piece = piece * rstd * gain.to(tl.float32)
            piece = piece.to(x.dtype.element_ty).to(tl.float32)
        total += tl.sum(w.to(tl.float32) * piece[None, :], axis=1)
        if SILU:
            ups += tl.sum(u.to(tl.float32) * piece[None, :], axis=1)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if SILU:
            ups += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * ups
    if ADD:
        total += base.to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


def matvec(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
    silu: bool = False,
    pdl: bool = False,
) -> None:
    """out [1, N] = f(x [1, K] @ weight [N, K]ᵀ + bias).

    norm: RMS norm with this weight is applied to x first. add: onto what `out` holds. silu: weight
    and bias have 2 N rows, gate then up, and f is silu(gate) * up.
    """
    n, size = out.shape[1], x.shape[1]
    if len(x) != 1 or len(out) != 1:
        raise ValueError(f"{tuple(x.shape) = }, {tuple(out.shape) = }, expected one row")
    t = tiling(n, size)
    launch(_matvec_kernel, (triton.cdiv(n, t.rows),))(
        x,
        weight,
        bias if bias is not None else x,
        norm if norm is not None else x,
        out,
        eps,
        N=n,
        K=size,
        K_PADDED=triton.next_power_of_2(size),
        STEP=min(t.step, triton.next_power_of_2(size)),
        ROWS=t.rows,
        NORM=norm is not None,
        BIAS=bias is not None,
        ADD=add,
        SILU=silu,
        PDL=pdl,
        num_warps=t.warps,
        launch_pdl=pdl,
    )
