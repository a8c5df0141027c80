"""The small pieces between matrix products: embedding, RMS norm, SiLU times up, state updates."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from astrai.kernels.gpu.heads import release_next, wait_for_inputs
from astrai.kernels.gpu.launch import launch


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, eps: tl.tensor,
    SIZE: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(x + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    tl.store(out + row * SIZE + column, (value * rstd * w).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float, pdl: bool = False) -> None:
    """out = norm(x) * weight, of each row; [T, size], in float32 inside."""
    size = x.shape[1]
    padded = triton.next_power_of_2(size)
    launch(_rms_norm_kernel, (out.shape[0],))(
        x, weight, out, eps,
        SIZE=size, PADDED=padded, PDL=pdl,
        num_warps=4 if padded <= 2048 else 8, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + column, mask=inside, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out + row * SIZE + column, value.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor, pdl: bool = False) -> None:
    """out = silu(gate) * up with gate_up [T, 2 * size], out [T, size]."""
    n_rows, size = out.shape
    launch(_silu_mul_kernel, (n_rows, triton.cdiv(size, 1024)))(
        gate_up, out, SIZE=size, BLOCK=1024, PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _embed_kernel(
    table: tl.tensor, tokens: tl.tensor, slots: tl.tensor, positions: tl.tensor,
    last: tl.tensor, out: tl.tensor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    if token < 0:
        slot = tl.load(slots + row)
        token = tl.load(last + 2 * slot + (tl.load(positions + row) & 1)).to(tl.int64)
        token = tl.maximum(token, 0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    value = tl.load(table + token * SIZE + column, mask=inside, other=0.0)
    tl.store(out + row * SIZE + column, value, mask=inside)


def embed(
    table: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor, last: Tensor, out: Tensor,
    pdl: bool = False,
) -> None:  # fmt: skip
    """out[i] = table[tokens[i]]; a token of -1 is the one last sampled for the row's slot.

    last: int32 [slots, 2]: the token of position p is at p % 2, so that computing a position
    twice reads the same token twice. tokens, slots, positions: int32 [T].
    """
    n_rows, size = out.shape
    launch(_embed_kernel, (n_rows, triton.cdiv(size, 1024)))(
        table, tokens, slots, positions, last, out,
        SIZE=size, BLOCK=1024, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _scatter_kernel(
    state: tl.tensor, updates: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(updates + 2 * i, mask=i < n, other=0)
    value = tl.load(updates + 2 * i + 1, mask=i < n, other=0)
    tl.store(state + at, value, mask=i < n)


def scatter(state: Tensor, updates: Tensor, n: int) -> None:
    """state[updates[i, 0]] = updates[i, 1] for i < n; all int32, no place twice."""
    launch(_scatter_kernel, (triton.cdiv(n, 1024),))(state, updates, n, BLOCK=1024, num_warps=4)
