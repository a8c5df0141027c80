"""One log, many readers: every decision of the scheduler as a small event.

With no reader attached an event costs one truth test at the place that would emit it:

    if events:
        events.emit("admit", task.id, slot, cached)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# kind → the names of its values, in order. Every event also carries the tick in which it was
# decided.
KINDS: dict[str, tuple[str, ...]] = {
    # `choices`: the tasks of its other choices, which wait for the first token of this one.
    "arrive": ("task", "request", "n_prompt", "max_tokens", "priority", "time", "choices"),
    "refuse": ("request", "why"),
    # `n_output`: tokens of all tasks since the start.
    "tick": ("time", "n_running", "n_waiting", "free", "cached", "held", "n_output"),
    "wait": (
        "reason",
        "head",
        "n_waiting",
    ),  # why the head of the queue, and so everybody behind it, waits
    "grammar": ("task", "error"),  # what a task waited for is compiled, or (not null) refused
    # `waits`: reason → ticks so far, as the scheduler counted them; `time`: first admission.
    "admit": ("task", "slot", "n_cached", "waits", "time"),
    # What the index gave: `n_hit` of the `n_full` positions in full pages; `evicted`: the tick that
    # took the page at `n_hit`, -1 if the prompt has none there or none is remembered.
    "prefix": ("task", "n_hit", "n_full", "evicted"),
    "fork": ("task", "of", "n_shared"),
    "take": ("task", "frames"),  # page frames that were free and are now held
    "share": ("task", "frames"),  # page frames held or cached, now held by one more
    "evict": ("frames",),  # cached page frames that became free
    "copy": ("task", "source", "target"),
    "index": ("task", "frames"),  # full pages that the prefix cache can find from now on
    "return": ("task", "frames"),  # frames the task let go of, in this order
    "prefill": ("task", "start", "count"),
    "decode": ("tasks",),
    "groups": ("sizes",),  # how the decode entries share dense matmuls
    "preempt": ("task", "by"),
    "first_token": ("task", "time"),
    "end": ("task", "reason", "n_output", "time", "waits"),
    "forget": ("frames",),  # suspect pages, out of the index before they are returned
    "abort": ("task",),  # asked for; the task ends in the next Cleanup
    "results": ("plan",),  # Cleanup applies what became of the plan of that tick
    # The start of a tick and the ends of Cleanup, Refill, Prefill; "tick" has the end of Decode.
    "phases": ("began", "cleaned", "refilled", "prefilled"),
    "launch": ("plan", "began", "ended"),  # the host gave the plan to the device
    "read": ("plan", "began", "ended"),  # the host waited for what became of the plan
    # The state between two ticks, for a reader that came late; only after `request_snapshot`.
    "snapshot": ("time", "config", "tasks", "indexed", "blocked"),
}

Reader = Callable[[int, str, tuple[Any, ...]], None]


class EventLog:
    """Hands each event to the attached readers, in the owner thread. Falsy while nobody reads."""

    __slots__ = ("_lock", "_readers", "snapshot_due", "tick", "wake")

    def __init__(self) -> None:
        self.tick = 0
        self.snapshot_due = False  # the owner thread emits one before it does anything else
        self.wake: Callable[[], None] | None = None  # makes an idle loop take a tick
        self._readers: tuple[Reader, ...] = ()  # replaced, never changed: `emit` may be in it
        self._lock = threading.Lock()  # of replacing them: any thread may, and none is lost

    def __bool__(self) -> bool:
        return bool(self._readers)

    def attach(self, reader: Reader) -> None:
        """Call `reader(tick, kind, values)` for every event from now on."""
        with self._lock:
            self._readers = (*self._readers, reader)

    def detach(self, reader: Reader) -> None:
        with self._lock:
            self._readers = tuple(other for other in self._readers if other != reader)

    def request_snapshot(self) -> None:
        """Have a "snapshot" event emitted to all readers, soon, between two ticks. Any thread."""
        self.snapshot_due = True
        if self.wake is not None:
            self.wake()

    def emit(self, kind: str, *values: Any) -> None:
        """A reader that raises is detached, with a line in the log: it must not end the loop."""
        for reader in self._readers:
            try:
                reader(self.tick, kind, values)
            except Exception:
                self.detach(reader)
                logger.exception("a reader failed at event %s and is detached: %r", kind, reader)
