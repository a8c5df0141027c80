"""Work that others wrote, off the event loop and for a bounded time."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

# After an interrupt: the time until work that is inside of one long call of a library is given up.
_GRACE_SECONDS = 1.0
_POOL = ThreadPoolExecutor(4, thread_name_prefix="astrai-template")


class OutOfTime(Exception):
    """The work was interrupted."""


class _Interrupt(BaseException):
    """Raised in the working thread, between two of its instructions."""


class _Job(Generic[T]):
    """Work in one thread that another may interrupt.

    The exception is set only while the work runs, and `run` does not return before it arrived: the
    thread belongs to a pool, and what it does next must not be hit. Work that is interrupted before
    its thread begins with it is not begun. Owns the work.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._interrupted = False

    def run(self) -> T:
        with self._lock:
            if self._interrupted:
                raise OutOfTime
            self._thread = threading.get_ident()
        try:
            try:
                result = self._work()
            except _Interrupt:
                raise
            except BaseException:
                self._settle()
                raise
            self._settle()
            return result
        except _Interrupt:
            raise OutOfTime from None

    def interrupt(self) -> None:
        """Once; any thread."""
        with self._lock:
            if self._interrupted:
                return
            self._interrupted = True
            if self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupt)
                )

    def _settle(self) -> None:
        """The work is done: nobody interrupts from now on, and who did is waited for."""
        with self._lock:
            self._thread = None
            hit = self._interrupted
        deadline = time.monotonic() + _GRACE_SECONDS
        while hit and time.monotonic() < deadline:
            time.sleep(0.0005)


async def timeboxed(work: Callable[[], T], seconds: float) -> T:
    """`work()` in another thread. Raises OutOfTime if it is not done in so many seconds.

    Python code is interrupted wherever it is; a single call into a library is not, so it keeps its
    thread until it returns.
    """
    job = _Job(work)
    future = asyncio.get_running_loop().run_in_executor(_POOL, job.run)
    try:
        done, _ = await asyncio.wait({future}, timeout=seconds)
        if not done:
            job.interrupt()
            done, _ = await asyncio.wait({future}, timeout=_GRACE_SECONDS)
    except asyncio.CancelledError:
        job.interrupt()
        future.cancel()
        raise
    if not done:
        future.cancel()
        future.add_done_callback(_seen)
        raise OutOfTime
    return future.result()


def _seen(future: asyncio.Future[T]) -> None:
    """Whatever became of it, nobody waits any more."""
    if not future.cancelled():
        future.exception()
