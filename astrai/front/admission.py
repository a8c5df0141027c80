"""Who may join the queue, and the ways in which the edge ends a request by itself."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from astrai.inference.task import Task

_PACE = 64  # admissions that say how fast the queue moves
_LONGEST_WAIT = 600  # seconds: no client is told to stay away longer


class Refused(RuntimeError):
    """Not now: come back in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Refused):
    """As many requests, or prompt tokens, wait as the engine was told to hold."""


class ShuttingDown(Refused):
    """The engine takes no new requests, or ends an open one, because it stops."""


class DeadlineExceeded(RuntimeError):
    """The request took longer than it was given."""


class SlowReader(RuntimeError):
    """So much was made ready that nobody took that the request was ended."""


class Admission:
    """The bounds of the queue, kept at the edge so that a refusal costs the loop nothing.

    A request waits from `enter` until the loop admits it for the first time. A request that finds
    a free slot is never refused, whatever the bounds: it hardly waits.

    Owns the count of requests and prompt tokens that wait; any thread may call.
    """

    def __init__(
        self,
        max_waiting: int,
        max_waiting_tokens: int,
        max_slots: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self._max_slots = max_slots
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[int, int] = {}  # task id → prompt tokens
        self._running: set[int] = set()
        self.n_tokens = 0  # of the prompts that wait
        self._admitted_at: deque[float] = deque(maxlen=_PACE)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def enter(self, task: Task) -> None:
        """The request of `task` joins the queue. Raises QueueFull with both numbers."""
        with self._lock:
            # The loop admits at its next tick: until then, free slots are spoken for.
            beyond = len(self._waiting) + len(self._running) - self._max_slots
            if beyond >= 0:
                self._check(beyond, task.n_prompt)
            self._waiting[task.id] = task.n_prompt
            self.n_tokens += task.n_prompt

    def admit(self, task_id: int) -> None:
        """The loop gave it a slot. Called again, or for what never waited, it does nothing."""
        with self._lock:
            n_prompt = self._waiting.pop(task_id, None)
            if n_prompt is not None:
                self.n_tokens -= n_prompt
                self._running.add(task_id)
                self._admitted_at.append(self._clock())

    def leave(self, task_id: int) -> None:
        """The request is over."""
        with self._lock:
            self.n_tokens -= self._waiting.pop(task_id, 0)
            self._running.discard(task_id)

    def retry_after(self) -> int:
        """Seconds in which the queue of now would be empty at its present pace, at least 1."""
        if len(self._admitted_at) < 2:
            return 1
        pace = len(self._admitted_at) / max(self._clock() - self._admitted_at[0], 1e-3)
        return min(max(math.ceil(len(self._waiting) / pace), 1), _LONGEST_WAIT)

    def _check(self, n_waiting: int, n_prompt: int) -> None:
        n_waiting = min(n_waiting, len(self._waiting))
        if n_waiting >= self.max_waiting:
            raise QueueFull(
                f"{n_waiting} requests wait, at most {self.max_waiting} may", self.retry_after()
            )
        if self._waiting and self.n_tokens + n_prompt > self.max_waiting_tokens:
            raise QueueFull(
                f"prompts of {self.n_tokens} tokens wait, at most {self.max_waiting_tokens} may, "
                f"and this one has {n_prompt}",
                self.retry_after(),
            )
