"""Compiled functions, called from Python: in this thread, or in all threads of PyTorch at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

# What compiled functions read and write.
DTYPES = (torch.float32, torch.bfloat16)

_POINTER = ctypes.c_void_p
_Compiled = ctypes.CFUNCTYPE(None, _POINTER)


def alone(address: int) -> Callable[[int], None]:
    """Calls the compiled function at `address` in this thread: (address of its argument)."""
    return _Compiled(address)


def shared(address: int) -> Callable[[int, int], None]:
    """Calls it in so many threads at once: (address of the argument of all, threads)."""
    one = _Compiled(address)

    def call(argument: int, n_threads: int) -> None:
        if _parallel is None or n_threads == 1:
            one(argument)
        else:
            _parallel(address, argument, n_threads, 0)

    return call


def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Runs a function in a team of threads: by the OpenMP library that PyTorch has loaded, so that
    the team is PyTorch's. None where PyTorch runs on another library."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        function = ctypes.CDLL(str(path)).GOMP_parallel
        function.argtypes = [_POINTER, _POINTER, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        parallel: Callable[[int, int, int, int], None] = function
        return parallel
    return None


_parallel = _openmp()
