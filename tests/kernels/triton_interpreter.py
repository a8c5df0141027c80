"""Triton kernels on the CPU: import this before any kernel. Skips the module without Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """The interpreter makes Python integers of arrays of one element; newer numpy refuses that."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum of float64 arrays, and what it is short of (0 where that is not finite)."""
    with np.errstate(all="ignore"):
        total = a + b
        part = total - a
        rest = (a - (total - part)) + (b - part)
    return total, np.where(np.isfinite(rest), rest, 0.0)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32: x * y + z, rounded once. The interpreter rounds twice."""
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)  # exact
        total, rest = two_sum(product, z.astype(np.float64))
        # Rounded to the neighbour with an odd mantissa, it is rounded to float32 as the exact sum.
        even = total.view(np.int64) % 2 == 0
        odd = np.where(even & (rest != 0), np.nextafter(total, np.copysign(np.inf, rest)), total)
        return odd.astype(np.float32)


def add_rz(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32: x + y, rounded towards 0."""
    total, rest = two_sum(x.astype(np.float64), y.astype(np.float64))
    with np.errstate(all="ignore"):
        near = total.astype(np.float32)
        wide = near.astype(np.float64)
        beyond = (np.abs(wide) > np.abs(total)) | ((wide == total) & (wide * rest < 0))
        return np.where(beyond, np.nextafter(near, np.float32(0)), near)


def _fast_expf(x: np.ndarray) -> np.ndarray:
    with np.errstate(under="ignore"):
        return np.exp(x)


def _elementwise(compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        shaped = [arg for arg in args if isinstance(arg, tl.tensor)]
        like = max(shaped, key=lambda arg: arg.handle.data.size)
        data = [
            arg.handle.data if isinstance(arg, tl.tensor) else np.float32([arg]) for arg in args
        ]
        return tl.tensor(interpreter.TensorHandle(compute(*data), like.dtype.scalar), like.type)

    return call


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)


def _create_maximum(self: Any, x: Any, y: Any) -> Any:
    return self.binary_op(x, y, np.fmax)


interpreter.InterpreterBuilder.create_fma = _create_fma
# Without propagate_nan the larger one is the number.
interpreter.InterpreterBuilder.create_maxnumf = _create_maximum
# The interpreter has no functions of libdevice.
libdevice.add_rz = _elementwise(add_rz)
libdevice.fast_expf = _elementwise(_fast_expf)
