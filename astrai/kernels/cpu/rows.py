"""The small operations between the products of a decoder layer, row by row, as compiled code.

Each takes addresses, and a few microseconds where PyTorch takes the overhead of several operators.
A row's bits depend on nothing but that row. Sizes are multiples of 16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from astrai.kernels.cpu.keep import kept, sources
from astrai.kernels.cpu.lanes import (
    LANES,
    add,
    div,
    fma,
    load,
    load_int,
    mul,
    smaller,
    splat,
    store,
    total,
)
from astrai.kernels.cpu.numbers import INLINE, LOG2_E, exp2, read, write


@njit(**INLINE)
def _inverse_rms(squares: Any, n: int, eps: float) -> Any:
    mean = total(squares) / np.float32(n)
    return splat(np.float32(1.0) / np.sqrt(mean + np.float32(eps)))


@njit(**INLINE)
def _add_norm(
    hidden: int, added: int, weight: int, out: int, n_rows: int, width: int, size: int, eps: float
) -> None:
    """hidden, float32 [n_rows, width], += added (0: nothing); out = norm(hidden) * weight.

    added, out: numbers of `size` bytes; weight: float32 [width].
    """
    for row in range(n_rows):
        here, squares = hidden + 4 * row * width, splat(np.float32(0.0))
        for i in range(0, width, LANES):
            x = load(here + 4 * i)
            if added:
                x = add(x, read(added + (row * width + i) * size, size))
                store(here + 4 * i, x)
            squares = fma(x, x, squares)
        factor = _inverse_rms(squares, width, eps)
        for i in range(0, width, LANES):
            x = mul(mul(load(here + 4 * i), factor), load(weight + 4 * i))
            write(out + (row * width + i) * size, size, x)


@njit(**INLINE)
def _turn_head(
    head: int, half: int, size: int, weight: int, cosine: int, sine: int, eps: float
) -> None:
    factor = splat(np.float32(1.0))
    if weight:
        squares = splat(np.float32(0.0))
        for i in range(0, 2 * half, LANES):
            x = read(head + size * i, size)
            squares = fma(x, x, squares)
        factor = _inverse_rms(squares, 2 * half, eps)
    for i in range(0, half, LANES):
        low, high = head + size * i, head + size * (i + half)
        a, b = read(low, size), read(high, size)
        if weight:
            a = mul(mul(a, factor), load(weight + 4 * i))
            b = mul(mul(b, factor), load(weight + 4 * (i + half)))
        if cosine:
            c, s = load(cosine + 4 * i), load(sine + 4 * i)
            minus = mul(splat(np.float32(-1.0)), s)
            a, b = fma(a, c, mul(b, minus)), fma(b, c, mul(a, s))
        write(low, size, a)
        write(high, size, b)


@njit(**INLINE)
def _turn(
    qkv: int, stride: int, n_rows: int, n_heads: int, n_kv: int, dim: int, size: int,
    positions: int, cosines: int, sines: int, q_weight: int, k_weight: int, eps: float,
) -> None:  # fmt: skip
    """Norm (weights 0: none) and rope (cosines 0: none) of the q and k heads of each row, in place.

    qkv: rows `stride` bytes apart; cosines, sines: float32 [positions, dim // 2].
    """
    half = dim // 2
    for row in range(n_rows):
        at, cosine, sine = qkv + row * stride, cosines, sines
        if cosines:
            turned = 4 * half * load_int(positions + 8 * row)
            cosine, sine = cosines + turned, sines + turned
        for head in range(n_heads):
            _turn_head(at + head * dim * size, half, size, q_weight, cosine, sine, eps)
        for head in range(n_heads, n_heads + n_kv):
            _turn_head(at + head * dim * size, half, size, k_weight, cosine, sine, eps)


@njit(**INLINE)
def _gate(gate_up: int, out: int, n_rows: int, width: int, size: int) -> None:
    """out [n_rows, width] = silu(gate) * up; gate_up: [n_rows, 2 * width], gate then up."""
    one, most = splat(np.float32(1.0)), splat(np.float32(126.0))
    for row in range(n_rows):
        gate = gate_up + 2 * row * width * size
        for i in range(0, width, LANES):
            x = read(gate + i * size, size)
            up = read(gate + (width + i) * size, size)
            e = exp2(smaller(mul(x, splat(np.float32(-LOG2_E))), most))
            write(out + (row * width + i) * size, size, mul(div(x, add(one, e)), up))


class RowKernels(NamedTuple):
    """Called with integers and, last, eps: see the functions of these names."""

    add_norm: Callable[..., None]
    turn: Callable[..., None]
    gate: Callable[..., None]
    compiled: tuple[Any, ...]  # kept: the others hold their addresses


def _entries(version: int) -> tuple[Callable[..., None], ...]:
    """Closes over `sources`."""

    def add_norm(
        hidden: int, added: int, weight: int, out: int, n_rows: int, width: int, size: int,
        eps: float,
    ) -> None:  # fmt: skip
        _ = version
        _add_norm(hidden, added, weight, out, n_rows, width, size, eps)

    def turn(
        qkv: int, stride: int, n_rows: int, n_heads: int, n_kv: int, dim: int, size: int,
        positions: int, cosines: int, sines: int, q_weight: int, k_weight: int, eps: float,
    ) -> None:  # fmt: skip
        _ = version
        _turn(
            qkv, stride, n_rows, n_heads, n_kv, dim, size, positions, cosines, sines,
            q_weight, k_weight, eps,
        )  # fmt: skip

    def gate(gate_up: int, out: int, n_rows: int, width: int, size: int) -> None:
        _ = version
        _gate(gate_up, out, n_rows, width, size)

    return add_norm, turn, gate


@functools.cache
def row_kernels() -> RowKernels:
    add_norm, turn, gate = (
        kept(types.void(*[types.int64] * n, *[types.float64] * m), function)
        for function, n, m in zip(_entries(sources()), (7, 12, 5), (1, 1, 0))
    )
    return RowKernels(add_norm.ctypes, turn.ctypes, gate.ctypes, (add_norm, turn, gate))
