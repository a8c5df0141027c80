"""Who runs, what each tick computes, and why the others wait. Plain data in and out, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from astrai.config import SchedulerConfig
from astrai.inference.cache.bitmask import BitMask
from astrai.inference.cache.books import Books
from astrai.inference.events import EventLog
from astrai.inference.grouping import groups_of
from astrai.inference.snapshot import snapshot_of
from astrai.inference.task import (
    WAIT_REASONS,
    Entry,
    FinishReason,
    Outcome,
    Plan,
    Task,
    TokenLogprob,
    Update,
    WaitReason,
)
from astrai.inference.waiting import WaitingQueue


def _nobody_asks() -> float:
    return 0.0


class Results(NamedTuple):
    """What became of a plan: one outcome per entry, in the plan's order."""

    plan: Plan
    outcomes: Sequence[Outcome]


class Scheduler:
    """Turns queues and page counts into plans, once per tick.

    One owner thread calls `add`, `abort` and `tick`; nothing else touches a task, a page or a slot.

    Invariants, checked by `check`:
      - a task is in exactly one of waiting, gated, running, held back by its leader, ended;
      - running tasks, and only they, own a slot, pages and pooled states; none of them is gated.

    Owns tasks, slots and the order of both. Does not own page state (Books) nor anything on a
    device (the runner).
    """

    def __init__(
        self, config: SchedulerConfig, books: Books, clock: Callable[[], float], events: EventLog
    ) -> None:
        self.config = config
        self.books = books
        self.events = events
        self.n_tick = 0
        self.running: dict[int, Task] = {}  # task id → task, in order of admission
        self.waiting = WaitingQueue()
        self.gated: dict[int, Task] = {}  # wait for their grammar, beside the queue
        self.tasks: dict[int, Task] = {}  # every task that has not ended
        self.free_slots = BitMask(config.max_slots)  # free = ~occupied
        self.blocked: WaitReason | None = None  # why the head of the queue waits
        self.wait_ticks: dict[str, int] = dict.fromkeys(WAIT_REASONS, 0)
        self.n_preemptions = 0
        self.n_output = 0
        self.clock = clock
        self._updates: dict[int, Update] = {}
        self._aborted: list[Task] = []
        self._clears: list[int] = []

    # ── messages ──────────────────────────────────────────────────────────────────────────────────

    def check_fits(self, task: Task) -> None:
        """Raise ValueError, with both numbers, if the task could never fit. Any thread may ask."""
        task.check_fits(self.books.pool.n_pages, self.books.page_size)

    def add(self, task: Task) -> None:
        """Queue a task. Raises ValueError if it could never fit."""
        self.check_fits(task)
        task.arrived_at = self.clock()
        aged = self.n_tick + task.priority * self.config.ageing_ticks
        task.key = (aged, task.id, 0)
        for sibling in task.siblings:
            sibling.arrived_at, sibling.key = task.arrived_at, (aged, task.id, sibling.index)
            sibling.leader = task
            self.tasks[sibling.id] = sibling
        self._enqueue(task)
        if self.events:
            self.events.emit(
                "arrive",
                task.id,
                task.request_id,
                task.n_prompt,
                task.max_tokens,
                task.priority,
                task.arrived_at,
                [sibling.id for sibling in task.siblings],
            )
            if task.gated:
                self.events.emit("wait", "grammar", task.id, self.n_waiting)

    def abort(self, task_id: int) -> None:
        """End a task at the next Cleanup; unknown or ended ids are fine."""
        if task := self.tasks.get(task_id):
            self._aborted.append(task)
            if self.events:
                self.events.emit("abort", task_id)

    def grammar_done(self, task_id: int, error: str | None = None) -> None:
        """What a gated task waits for is compiled, and it joins the queue at its place; or it is
        refused, and all choices of the request end."""
        task = self.gated.pop(task_id)
        if self.events:
            self.events.emit("grammar", task_id, error)
        if error is None:
            self._count_waits(task)
            self._enqueue(task)
            return
        choices, task.siblings = [task, *task.siblings], []
        for choice in choices:
            self._end(choice, "error", error=error)

    # ── the tick ──────────────────────────────────────────────────────────────────────────────────

    def tick(self, results: Results | None = None) -> Plan:
        """One turn of the loop: apply what came back, admit, and plan the next launch."""
        self.n_tick += 1
        self.events.tick = self.n_tick
        plan = Plan(self.n_tick)
        if self.events.snapshot_due:
            self.events.snapshot_due = False
            self.events.emit("snapshot", *snapshot_of(self))
        clock = self.clock if self.events else _nobody_asks
        began = clock()
        self.cleanup(results)
        cleaned = clock()
        self.refill(plan)
        refilled = clock()
        self.prefill(plan)
        prefilled = clock()
        self.decode(plan)
        if plan.entries:
            plan.clears, self._clears = self._clears, []
        if clock is not _nobody_asks:
            self.events.emit("phases", began, cleaned, refilled, prefilled)
            self._emit_tick()
        return plan

    def cleanup(self, results: Results | None) -> None:
        """Take the tokens of an earlier launch, end tasks, give back their pages and slots."""
        if results is not None:
            if self.events:
                self.events.emit("results", results.plan.tick)
            entries = results.plan.entries.values()
            for entry, outcome in zip(entries, results.outcomes, strict=True):
                self._apply(entry, outcome)
        for task in self._aborted:
            self._end(task, "abort")
        self._aborted.clear()

    def refill(self, plan: Plan) -> None:
        """Admit waiting tasks in order while slots, pages and prefill budget last; write down why
        not.

        The head of the queue is never skipped, so what blocks it is why everybody behind it waits
        too. Who waits for a grammar is not in the queue.
        """
        self.wait_ticks["grammar"] += bool(self.gated)
        blocked: WaitReason | None = None
        backlog = 0
        if self.waiting.head is not None:  # in most ticks nobody waits
            backlog = sum(task.wanted for task in self.running.values() if task.prefilling)
        closed = self.config.batching == "static" and bool(self.running)
        while blocked is None and (head := self.waiting.head) is not None:
            blocked = "slots" if closed else self._why_not(head, backlog, plan)
            if blocked is None:
                self.waiting.remove(head)
                self._seat(head)
                backlog += head.wanted
            else:
                self.wait_ticks[blocked] += 1
                if blocked != self.blocked and self.events:
                    self.events.emit("wait", blocked, head.id, self.n_waiting)
        self.blocked = blocked

    def prefill(self, plan: Plan) -> None:
        """Prompt chunks in order of admission, under the budget. The pages are there."""
        budget = self.config.prefill_budget
        for task in self.running.values():
            if budget == 0:
                break
            if task.prefilling:
                count = min(task.wanted, budget)
                budget -= count
                self._plan_entry(plan, task, count)
                if self.events:
                    self.events.emit("prefill", task.id, task.computed - count, count)

    def decode(self, plan: Plan) -> None:
        """One position for every task whose prompt is done; pages grow on demand.

        Terminates, and somebody always advances: each preemption frees at least one page and never
        takes the oldest task, which `add` made sure fits alone.
        """
        steps: list[Task] = []
        before = self.n_preemptions
        for task in list(self.running.values()):
            # A preemption below can end the turn of a task later in this list; one in the plan had
            # its turn above.
            if task.slot < 0 or not task.decoding or task in plan.entries:
                continue
            if self._grow(task, plan):
                self._plan_entry(plan, task, 1)
                steps.append(task)
        if self.n_preemptions > before:  # perhaps of tasks that had their turn
            steps = [task for task in steps if task in plan.entries]
        plan.groups = groups_of(steps, self.config.group_decode)
        if steps and self.events:
            self.events.emit("decode", [task.id for group in plan.groups for task in group])
            self.events.emit("groups", [len(group) for group in plan.groups])

    # ── what the edge and the engine ask ──────────────────────────────────────────────────────────

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.tasks

    @property
    def n_waiting(self) -> int:
        return len(self.tasks) - len(self.running)

    def drain_updates(self) -> list[Update]:
        """What happened to each task since the last call."""
        updates = list(self._updates.values())
        self._updates.clear()
        return updates

    def check(self) -> None:
        """Raise RuntimeError with the numbers if an invariant is broken."""
        self.books.check(self.running.values())
        slots = sorted(task.slot for task in self.running.values())
        free = list(self.free_slots)
        if sorted(slots + free) != list(range(self.config.max_slots)):
            raise RuntimeError(
                f"slots of running tasks {slots} and {free = } are not all slots once"
            )
        held_back = [s.id for t in self.tasks.values() for s in t.siblings if s.id in self.tasks]
        queued = [task.id for task in self.waiting.in_order()]
        places = [*self.running, *queued, *self.gated, *held_back]
        if sorted(places) != sorted(self.tasks):
            raise RuntimeError(
                f"{len(self.running)} running, {queued = }, gated {list(self.gated)} and "
                f"{held_back = } are not the {len(self.tasks)} tasks once"
            )
        for task in self.tasks.values():
            self._check_task(task)

    def _check_task(self, task: Task) -> None:
        runs = task.id in self.running
        if runs and task.gated:
            raise RuntimeError(f"task {task.id} runs, but its grammar is not compiled")
        if not runs and (task.slot >= 0 or task.page_table):
            raise RuntimeError(
                f"task {task.id} does not run, but has {task.slot = }, {task.page_table = }"
            )
        if task.computed not in range(task.target + 1) or task.pending < 0:
            raise RuntimeError(
                f"task {task.id} has {task.computed = }, {task.pending = }, {task.target = }"
            )
        if task.pooled and (task.params.pooling is None or not runs):
            raise RuntimeError(
                f"task {task.id} has pooled states: {task.params.pooling = }, {runs = }"
            )

    def _emit_tick(self) -> None:
        free, cached, held, _ = self.books.counts
        n_running = len(self.running)
        self.events.emit(
            "tick", self.clock(), n_running, self.n_waiting, free, cached, held, self.n_output
        )

    # ── pieces of the phases ──────────────────────────────────────────────────────────────────────

    def _enqueue(self, task: Task) -> None:
        self.tasks[task.id] = task
        ticks = self.wait_ticks.items()
        task.wait_mark = {r: n for r, n in ticks if (r == "grammar") == task.gated}
        if task.gated:
            self.gated[task.id] = task
            return
        self.waiting.push(task)

    def _apply(self, entry: Entry, outcome: Outcome) -> None:
        task = entry.task
        seated = entry.epoch == task.epoch and task.slot >= 0
        # Preempted with a token on its way: its whole prompt is launched, and not scored again.
        scored = seated or (entry.epoch == task.epoch and task.pending > 0)
        if entry.samples:
            task.pending -= 1
        if task.finish_reason is not None:
            return  # it ended while this launch ran: the extra token is dropped
        if outcome.error is not None:
            self._end(task, "error", error=outcome.error)
            return
        if scored and outcome.prompt_logprobs:
            task.prompt_logprobs += outcome.prompt_logprobs
        if seated and outcome.pooled:
            task.pooled.append(outcome.pooled)
        if entry.samples:
            self._take_token(task, outcome)
        if task.finish_reason is None and seated:
            self.books.commit(task, entry.start + entry.n)
            if task.samples_nothing and entry.start + entry.n == task.n_prompt:
                self._end(task, "length")

    def _take_token(self, task: Task, outcome: Outcome) -> None:
        token = outcome.token
        task.tokens.append(token)
        self.n_output += 1
        if task.first_token_at is None:
            task.first_token_at = self.clock()
            if self.events:
                self.events.emit("first_token", task.id, task.first_token_at)
            self._release_siblings(task)
        self._report(task, [token], [outcome.logprob] if outcome.logprob else [])
        matched = None
        if task.stop_check is not None:
            try:
                matched = task.stop_check(token)
            except Exception as error:  # what breaks in a request's own text ends that request only
                self._end(task, "error", error=f"stop strings: {type(error).__name__}: {error}")
                return
        complete = False
        if task.matcher is not None:
            try:
                complete = task.matcher.advance(token)
            except Exception as error:
                self._end(task, "error", error=str(error))
                return
        if token in task.stop_ids and task.n_output > task.params.min_tokens:
            self._end(task, "stop", stop_reason=token)
        elif matched is not None:
            self._end(task, "stop", stop_reason=matched)
        elif complete and task.matcher is not None:
            self._end(task, "stop", stop_reason=token if token in task.matcher.eos_ids else None)
        elif task.n_output >= task.max_tokens:
            self._end(task, "length")

    def _release_siblings(self, leader: Task) -> None:
        """The prompt is computed (or never will be): the other choices may be admitted."""
        for sibling in leader.siblings:
            if sibling.finish_reason is None:
                self._enqueue(sibling)
                if sibling.gated and self.events:
                    self.events.emit("wait", "grammar", sibling.id, self.n_waiting)
        leader.siblings = []

    def _end(
        self,
        task: Task,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> None:
        if task.finish_reason is not None:
            return
        task.finish_reason, task.stop_reason, task.error = reason, stop_reason, error
        task.ended_at = self.clock()
        if task.slot >= 0:
            if reason in ("stop", "length"):  # else a launch is on its way, and could still fail
                self.books.commit(task, min(task.computed, len(task.tokens) - 1))
            self._unseat(task, keep=reason != "error")
        else:
            self._count_waits(task)
            self.waiting.remove(task)
            self.gated.pop(task.id, None)
        self._release_siblings(task)
        del self.tasks[task.id]
        self._report(task, [], [])
        if self.events:
            waits = dict(task.waits)
            self.events.emit("end", task.id, reason, task.n_output, task.ended_at, waits)

    def _report(self, task: Task, token_ids: list[int], logprobs: list[TokenLogprob]) -> None:
        if before := self._updates.get(task.id):
            token_ids, logprobs = before.token_ids + token_ids, before.logprobs + logprobs
        self._updates[task.id] = Update(task, token_ids, logprobs, task.finish_reason)

    def _why_not(self, task: Task, backlog: int, plan: Plan) -> WaitReason | None:
        """Give the head of the queue its pages, or say which budget refuses it."""
        if task.pending:
            return "results"  # preempted, and its last token is still on the device
        if not len(self.free_slots):
            return "slots"
        if backlog >= self.config.prefill_budget:
            return "prefill"
        # Some head room for those who run: else a newcomer's prefill would be the next preemption.
        reserve = 1 + len(self.running) // 8 if self.running else 0
        leader = task.leader
        if (
            leader is not None
            and leader.slot >= 0
            and leader.computed >= task.n_prompt
            and not task.n_output
        ):
            copy = self.books.fork(task, leader, reserve)
            if copy is None:
                return "pages"
            if copy[0] >= 0:
                plan.copies.append(copy)
            if self.events:
                self.events.emit("fork", task.id, leader.id, task.computed)
            return None
        return None if self.books.admit(task, reserve) else "pages"

    def _seat(self, task: Task) -> None:
        task.slot = self.free_slots.take()
        task.epoch += 1
        task.leader = None
        self.running[task.id] = task
        self._count_waits(task)
        if task.admitted_at is None:
            task.admitted_at = self.clock()
            task.n_cached = min(task.computed, task.n_prompt)
            self._report(task, [], [])
        if self.events:
            waits = dict(task.waits)
            self.events.emit("admit", task.id, task.slot, task.computed, waits, task.admitted_at)

    def _count_waits(self, task: Task) -> None:
        """It leaves the queue: what the queue waited for since it joined, it waited for."""
        for reason, mark in task.wait_mark.items():
            if waited := self.wait_ticks[reason] - mark:
                task.waits[reason] = task.waits.get(reason, 0) + waited
        task.wait_mark = {}

    def _unseat(self, task: Task, keep: bool = True) -> None:
        frames = task.page_table
        self.books.release(task, keep)
        if not keep:  # what is still indexed was there before the task, and others will read it
            self._clears += [frame for frame in frames if frame in self.books.pool.free_mask]
        self.free_slots.put(task.slot)
        task.slot = -1
        del self.running[task.id]

    def _plan_entry(self, plan: Plan, task: Task, count: int) -> None:
        start = task.computed
        samples = start + count == task.target and not task.samples_nothing
        plan.entries[task] = Entry(task, start, count, samples, task.epoch)
        task.computed = start + count
        if samples:
            task.pending += 1

    def _grow(self, task: Task, plan: Plan) -> bool:
        """A page for the next position, if need be the youngest task's; False if that is `task`."""
        if task.computed < len(task.page_table) * self.books.page_size:
            return True
        while not self.books.grow(task, task.computed + 1):
            victim = max(self.running.values(), key=lambda other: other.key)
            self._preempt(victim, task, plan)
            if victim is task:
                return False
        return True

    def _preempt(self, victim: Task, by: Task, plan: Plan) -> None:
        """Free its pages, keep its tokens, compute it again later."""
        if (entry := plan.entries.pop(victim, None)) is not None and entry.samples:
            victim.pending -= 1
        self._unseat(victim)
        if not victim.n_output and not victim.pending:  # its prompt is computed, and scored, again
            victim.prompt_logprobs.clear()
            victim.pooled.clear()
        victim.n_preempted += 1
        self.n_preemptions += 1
        self._enqueue(victim)
        if self.events:
            self.events.emit("preempt", victim.id, by.id)
