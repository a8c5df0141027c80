"""How a kernel is called, and how the kernels of a piece of work are compiled side by side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton


class _Noted(threading.local):
    """Calls noted instead of made, while `compile_ahead` looks at what a piece of work launches."""

    calls: list[Callable[[], Any]] | None = None


_noted = _Noted()


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`: what is returned is called with the kernel's arguments and options."""
    calls = _noted.calls
    if calls is None:
        return kernel[grid]

    def note(*args: Any, **options: Any) -> None:
        calls.append(lambda: kernel.warmup(*args, grid=grid, **options))

    return note


def compile_ahead(work: Callable[[], object]) -> None:
    """Compile every kernel that `work` launches, in parallel, without running one.

    Everything else in `work` runs: it must be harmless on memory that no kernel has written.
    """
    calls: list[Callable[[], Any]] = []
    _noted.calls = calls
    try:
        work()
    finally:
        _noted.calls = None
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        with triton.AsyncCompileMode(pool):
            kernels = [call() for call in calls]
        # What calls a kernel from Python is compiled too, the first time it is asked for.
        ready = {id(kernel): kernel for kernel in map(_result, kernels)}
        list(pool.map(lambda kernel: kernel.run, ready.values()))


def _result(kernel: Any) -> Any:
    return kernel.result() if hasattr(kernel, "result") else kernel
