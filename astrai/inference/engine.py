"""The loop: one owner thread, messages in, plans to the runner, updates out. No torch."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from astrai.inference.scheduler import Results, Scheduler
from astrai.inference.stall import StallWatch
from astrai.inference.task import Done, Outcome, Plan, Task, Update

if TYPE_CHECKING:
    from astrai.inference.grammar import Grammars

logger = logging.getLogger(__name__)

_GRAMMAR_SECONDS = 0.005  # between two looks at the compilers while there is nothing else to do


class Launch(Protocol):
    """A plan on its way through the device."""

    def wait(self) -> Sequence[Outcome]:
        """One outcome per entry of the plan, in its order."""


class PlanRunner(Protocol):
    """Turns plans into tokens."""

    depth: int  # launches that may be unread when the next is planned: 0 = none, 1 = overlap

    def launch(self, plan: Plan) -> Launch: ...


class Message(NamedTuple):
    """What other threads may say to the loop. One of the two is meant; neither: take a tick."""

    add: Sequence[Task] = ()
    abort: Sequence[int] = ()


class Health(NamedTuple):
    ok: bool
    reason: str
    numbers: dict[str, float]


class Engine:
    """Owns the scheduler and the runner; everything else talks to it through `post`.

    `deliver(updates)` is called in the owner thread after each Cleanup, before the next launch.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: PlanRunner,
        deliver: Callable[[list[Update]], None],
        stall_seconds: float = 60.0,
        grammars: Grammars | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.deliver = deliver
        self.watch = StallWatch(scheduler, stall_seconds, self._busy)
        self.grammars = grammars
        self.failure: str | None = None  # why the loop ended, if it did
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._in_flight: deque[tuple[Plan, Launch]] = deque()
        self._must_read = False  # the last plan was empty: only results can move anything
        self._stopping = False
        self._ended = False
        self._thread: threading.Thread | None = None
        scheduler.events.wake = lambda: self.post(Message())

    # ── any thread ──────────────────────────────────────────────────────────────────────────────

    def post(self, message: Message) -> None:
        """Hand a message to the loop; it is consumed at the start of the next tick.

        Once the loop has ended, added tasks are answered with an error instead.
        """
        self._inbox.put(message)
        if self._ended:
            self._refuse_inbox()

    def start(self) -> None:
        """Run the loop in its own thread."""
        if self._thread is not None:
            raise RuntimeError("the engine loop runs already")
        self._thread = threading.Thread(target=self._loop, name="astrai-engine", daemon=True)
        self._thread.start()
        self.watch.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End the loop after the present tick. What still runs is aborted, and its edge is told."""
        self._stopping = True
        self.watch.stop()
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None

    def health(self) -> Health:
        """True only while the loop steps or has nothing to do."""
        counts = self.scheduler.books.counts
        numbers = {
            "tick": self.scheduler.n_tick,
            "seconds_since_step": round(self.watch.since, 3),
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.n_waiting,
            "pages_free": counts.free,
            "pages_cached": counts.cached,
            "pages_held": counts.held,
            "pages_total": counts.total,
            "preemptions": self.scheduler.n_preemptions,
        }
        if self.failure is not None:
            return Health(False, f"the engine loop ended: {self.failure}", numbers)
        if self._thread is None or not self._thread.is_alive():
            return Health(False, "the engine loop is not running", numbers)
        if (why := self.watch.why()) is not None:
            return Health(False, why, numbers)
        return Health(True, "stepping" if self._busy() else "nothing to do", numbers)

    def _busy(self) -> bool:
        return not self.scheduler.idle or not self._inbox.empty()

    # ── the owner thread ────────────────────────────────────────────────────────────────────────

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self._in_flight and self._inbox.empty()

    def step(self) -> None:
        """One tick: messages, results of an earlier launch, plan, deliver, launch."""
        if self.scheduler.gated and self._must_read and not self._in_flight:
            # All that is left waits for a compiler.
            with contextlib.suppress(queue.Empty):
                self._read(self._inbox.get(timeout=_GRAMMAR_SECONDS))
        while not self._inbox.empty():
            self._read(self._inbox.get())
        self._ask_grammars()
        plan = self.scheduler.tick(self._results())
        self.watch.stepped(plan, len(self._in_flight))
        if updates := self.scheduler.drain_updates():
            self.deliver(updates)
        self._must_read = not plan
        if plan:
            began = self.scheduler.clock()
            self._in_flight.append((plan, self._launch(plan)))
            if events := self.scheduler.events:
                events.emit("launch", plan.tick, began, self.scheduler.clock())

    def _ask_grammars(self) -> None:
        """Let go of the tasks whose grammar is compiled, or refused."""
        for task in list(self.scheduler.gated.values()):
            asked = task.params.structured
            try:
                if self.grammars is None or asked is None:
                    raise ValueError("structured output: this engine has no compiler")
                task.matcher = self.grammars.matcher(asked)
                if task.matcher is None:
                    continue
                for choice in task.siblings:
                    choice.matcher = self.grammars.matcher(asked)
            except ValueError as error:
                self.scheduler.grammar_done(task.id, str(error))
            else:
                self.scheduler.grammar_done(task.id)

    def _loop(self) -> None:
        try:
            while not self._stopping:
                if self.idle:
                    self.scheduler.check()
                    message = self._inbox.get()
                    self.watch.woke()
                    self._read(message)
                self.step()
        except BaseException as error:  # the panics of extension modules are no Exceptions
            self.failure = f"{type(error).__name__}: {error}"
            logger.exception("the engine loop ended")
        finally:
            self._abort_all()

    def _read(self, message: Message | None) -> None:
        if message is None:
            return
        for task in message.add:
            try:
                self.scheduler.add(task)
            except ValueError as error:
                if events := self.scheduler.events:
                    events.emit("refuse", task.request_id, str(error))
                self._refuse(task, str(error))
        for task_id in message.abort:
            self.scheduler.abort(task_id)

    def _results(self) -> Results | None:
        """The oldest unread launch, once `depth` newer ones run or only results can help."""
        if not self._in_flight or (
            len(self._in_flight) <= self.runner.depth and not self._must_read
        ):
            return None
        plan, launch = self._in_flight.popleft()
        began = self.scheduler.clock()
        try:
            outcomes = launch.wait()
        except Exception:
            outcomes = self._isolate(plan)
        if events := self.scheduler.events:
            events.emit("read", plan.tick, began, self.scheduler.clock())
        return Results(plan, outcomes)

    def _launch(self, plan: Plan) -> Launch:
        try:
            return self.runner.launch(plan)
        except Exception:
            # Now, not when it is read: the next launch goes on from the tokens and pages of this.
            for _, earlier in self._in_flight:
                with contextlib.suppress(Exception):  # said when it is read
                    earlier.wait()
            return Done(self._isolate(plan))

    def _isolate(self, plan: Plan) -> list[Outcome]:
        """A launch failed: run its entries one by one, so that only those that fail alone are
        ended.

        Running an entry twice is harmless: it writes the same values to the same positions.
        """
        outcomes: list[Outcome] = []
        clears, copies = plan.clears, plan.copies
        for task, entry in plan.entries.items():
            try:
                groups = [[task]] if entry.n == 1 else []
                alone = Plan(plan.tick, {task: entry}, clears, copies, groups)
                outcomes += self.runner.launch(alone).wait()
                clears, copies = [], []
            except Exception as cause:
                outcomes.append(Outcome(error=f"{type(cause).__name__}: {cause}"))
        return outcomes

    def _refuse(self, task: Task, why: str) -> None:
        for choice in (task, *task.siblings):
            if choice.finish_reason is not None:
                continue
            choice.finish_reason, choice.error = "error", why
            self.deliver([Update(choice, [], [], "error")])

    def _refuse_inbox(self) -> None:
        why = self.failure or "the engine was stopped"
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                for task in message.add if message else ():
                    self._refuse(task, why)

    def _abort_all(self) -> None:
        """The loop ends: tell every edge that waits, so that nobody waits for ever."""
        self._ended = True
        self._refuse_inbox()
        for task in list(self.scheduler.tasks.values()):
            self._refuse(task, self.failure or "the engine was stopped")
