"""Numbers of either dtype as lanes, and the exponential: what the compiled kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from astrai.kernels.cpu.lanes import (
    fma,
    larger,
    load,
    load_short,
    mul,
    nearest,
    power_of_two,
    splat,
    store,
    store_short,
    sub,
)

# A function as part of its caller, where sizes are known when it is compiled.
INLINE: dict[str, Any] = {"error_model": "numpy", "forceinline": True}
LOG2_E = 1.4426950408889634


@njit(**INLINE)
def read(address: int, size: int) -> Any:
    """16 numbers of `size` bytes: 2, bfloat16, or 4, float32."""
    return load_short(address) if size == 2 else load(address)


@njit(**INLINE)
def write(address: int, size: int, value: Any) -> None:
    if size == 2:
        store_short(address, value)
    else:
        store(address, value)


@njit(**INLINE)
def exp2(x: Any) -> Any:
    """2**x of x < 127, to 2e-7; 0 below -127, NaN of NaN. Polynomial of Cephes' exp2f."""
    x = larger(x, splat(np.float32(-127.0)))
    whole = nearest(x)
    r = sub(x, whole)
    y = splat(np.float32(1.535336188319500e-4))
    y = fma(y, r, splat(np.float32(1.339887440266574e-3)))
    y = fma(y, r, splat(np.float32(9.618437357674640e-3)))
    y = fma(y, r, splat(np.float32(5.550332471162809e-2)))
    y = fma(y, r, splat(np.float32(2.402264791363012e-1)))
    y = fma(y, r, splat(np.float32(6.931472028550421e-1)))
    y = fma(y, r, splat(np.float32(1.0)))
    return mul(y, power_of_two(whole))
