"""When the loop does not move although it could: said in health, and its state written down once.

Two rules:
  - A tick that takes longer than `seconds` while there is work. Seen from another thread, since
    the loop itself may never come back.
  - STUCK_TICKS ticks in a row after each of which a task is queued, none runs, no launch is in
    flight, and at least one page is free or cached. (Tasks whose grammar is being compiled are not
    in the queue.) The policy always admits somebody in that state, so it is a fault.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Plan, Task

logger = logging.getLogger(__name__)

STUCK_TICKS = 8
_SHOWN = 16  # tasks of the queue and of the running in a description
_PAUSE = 0.02  # between two ticks of a loop that is stuck: it need not burn a core


class StallWatch:
    """Owns its thread and what it counted; only reads the scheduler."""

    def __init__(self, scheduler: Scheduler, seconds: float, busy: Callable[[], bool]) -> None:
        self.seconds = seconds
        self._scheduler = scheduler
        self._busy = busy
        self._stepped_at = time.monotonic()
        self._n_stuck = 0
        self._plan: Plan | None = None  # the last that was not empty
        self._reported = False
        self._closing = threading.Event()

    @property
    def since(self) -> float:
        """Seconds since the last tick."""
        return time.monotonic() - self._stepped_at

    def why(self) -> str | None:
        """How the loop is stalled, with numbers; None if it is not. Any thread."""
        if self._busy() and self.since > self.seconds:
            return f"no tick for {self.since:.1f} s with work to do"
        if self._n_stuck >= STUCK_TICKS:
            counts = self._scheduler.books.counts
            return (
                f"{self._scheduler.n_waiting} requests wait, none runs and {counts.free} pages are "
                f"free, {counts.cached} cached, for {self._n_stuck} ticks"
            )
        return None

    # ── the loop's thread ───────────────────────────────────────────────────────────────────────

    def woke(self) -> None:
        """The loop had nothing to do until now."""
        self._stepped_at = time.monotonic()

    def stepped(self, plan: Plan, n_in_flight: int) -> None:
        """After each tick."""
        self._stepped_at = time.monotonic()
        if plan:
            self._plan = plan
        counts = self._scheduler.books.counts
        stuck = (
            not plan
            and not n_in_flight
            and not self._scheduler.running
            and bool(self._scheduler.waiting)
            and counts.free + counts.cached > 0
        )
        self._n_stuck = self._n_stuck + 1 if stuck else 0
        if self._n_stuck >= STUCK_TICKS:
            self._report()
            time.sleep(_PAUSE)
        else:
            self._reported = False

    # ── its own thread ──────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        threading.Thread(target=self._run, name="astrai-watch", daemon=True).start()

    def stop(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(min(self.seconds / 4, 1.0)):
            if self.why() is not None:
                self._report()

    def _report(self) -> None:
        if not self._reported:
            self._reported = True
            state = json.dumps(describe(self._scheduler, self._plan))
            logger.error("the engine loop is stalled: %s: %s", self.why(), state)


def describe(scheduler: Scheduler, plan: Plan | None) -> dict[str, Any]:
    """The state of a loop that stands still, as JSON takes it, without any token.

    From another thread a loop that does move may be caught between two of its steps.
    """
    running = list(scheduler.running.values())
    counts = scheduler.books.counts
    return {
        "tick": scheduler.n_tick,
        "blocked": scheduler.blocked,
        "n_waiting": scheduler.n_waiting,
        "n_running": len(running),
        "slots_free": len(scheduler.free_slots),
        "pages": counts._asdict(),
        "queue": [_task(task) for task in scheduler.waiting.in_order()[:_SHOWN]],
        "running": [_task(task) for task in running[:_SHOWN]],
        "plan": None if plan is None else _plan(plan),
    }


def _task(task: Task) -> dict[str, Any]:
    names = ("id", "request_id", "n_prompt", "n_output", "max_tokens", "computed", "pending")
    state = {name: getattr(task, name) for name in (*names, "slot", "n_preempted", "finish_reason")}
    return {**state, "pages": len(task.page_table), "waits": dict(task.waits)}


def _plan(plan: Plan) -> dict[str, Any]:
    entries = [
        {"task": entry.task.id, "start": entry.start, "n": entry.n, "samples": entry.samples}
        for entry in list(plan.entries.values())[:_SHOWN]
    ]
    return {"tick": plan.tick, "n_entries": len(plan.entries), "entries": entries}
