"""How many of the CPU's threads an operation gets.

To share a small operation costs more than it saves: the threads must meet at its end, some 20 µs if
no other process has a core just then and milliseconds if one has, and what one core wrote is
read out of another's cache. So in a step of few rows all is done alone but the products over the
weights. The number of threads changes no result: sums are never shared among threads.
"""

from __future__ import annotations

import threading

import torch


class _Held(threading.local):
    n = 0  # threads of `together` in this thread, 0 while nobody is `alone`


_held = _Held()


def n_together() -> int:
    """Threads of `together` in this thread."""
    return _held.n or torch.get_num_threads()


class alone:
    """While entered, operations of this thread are not shared, except `together`."""

    __slots__ = ("_when",)

    def __init__(self, when: bool) -> None:
        self._when = when and not _held.n and torch.get_num_threads() > 1

    def __enter__(self) -> None:
        if self._when:
            _held.n = torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._when:
            torch.set_num_threads(_held.n)
            _held.n = 0


class together:
    """Within `alone`: all threads again, for an operation worth it."""

    __slots__ = ("_when",)

    def __init__(self, when: bool = True) -> None:
        self._when = when and _held.n > 0

    def __enter__(self) -> None:
        if self._when:
            torch.set_num_threads(_held.n)

    def __exit__(self, *_: object) -> None:
        if self._when:
            torch.set_num_threads(1)
