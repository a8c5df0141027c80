"""Runs a recording through the real scheduler and books, and compares every decision."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.cache.books import Books
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Results, Scheduler
from astrai.inference.task import NOTHING, Entry, FinishReason, Outcome, Plan, Task
from astrai.observe.recorder import ADDED, TIMES
from astrai.observe.recording import Event, Header, Recording, Step

# What the engine or the recorder adds to what the scheduler decides: given, not compared.
GIVEN = frozenset({"launch", "read", "refuse", "snapshot", *ADDED})


class Difference(NamedTuple):
    """The first event that replay gave otherwise. None: one side has no more of them."""

    tick: int
    place: int  # among the compared events of the tick
    expected: Event | None
    got: Event | None

    def __str__(self) -> str:
        def say(event: Event | None) -> str:
            return "nothing" if event is None else f"{event.kind} {list(event.values)}"

        return (
            f"tick {self.tick}, event {self.place}: expected {say(self.expected)}, "
            f"got {say(self.got)}"
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found."""

    n_ticks: int
    n_events: int  # compared
    n_tasks: int
    difference: Difference | None
    page_tables: dict[int, list[int]]  # of the tasks that still run at the end
    n_preemptions: int
    waits: dict[str, int]  # reason → ticks in which the head of the queue waited for it


class _Ending(NamedTuple):
    reason: FinishReason
    n_output: int


class _Recorded(RuntimeError):
    """Stands for what went wrong in the recorded run."""


class _Matcher:
    """Stands for a compiled grammar: the recorded ends say when it was complete or failed."""

    eos_ids: tuple[int, ...] = ()

    def advance(self, token: int) -> bool:
        return False


_MATCHER = _Matcher()


def synthetic_prompt(n_tokens: int, pages: Sequence[int], page_size: int) -> list[int]:
    """Tokens whose full pages are equal exactly where the hashes are: the hash ends the page.

    [ 0  0  0  hash 0 ][ 0  0  0  hash 1 ][ 0  0 …
    """
    tokens = [0] * n_tokens
    for i, page in enumerate(pages, 1):
        tokens[i * page_size - 1] = page
    return tokens


class Replayer:
    """Gives a fresh scheduler the messages and results that a recorded one got, step by step.

    A virtual clock stands still at the time of the step: no decision depends on it.

    Owns the scheduler, its books and the plans whose results have not come.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self.events = EventLog()
        self.books = Books(header.n_pages, header.page_size, header.prefix_cache, self.events)
        self.scheduler = Scheduler(header.scheduler, self.books, lambda: 0.0, self.events)
        self.n_tasks = 0
        self._told: list[Event] = []
        self._in_flight: dict[int, Plan] = {}
        self._pages: dict[int, deque[int]] = {}  # hashes of the pages that outputs will fill
        self._endings: dict[int, _Ending] = {}  # in the present step
        self.events.attach(lambda *event: self._told.append(Event(*event)))

    def step(self, step: Step) -> list[Event]:
        """Events of the scheduler when it gets what came before and in this turn."""
        self._told = []
        self._before(step.before)
        if not step.events:
            return self._told
        results: Results | None = None
        for _, kind, values in step.events:
            if kind == "end":
                self._endings[values[0]] = _Ending(values[1], values[2])
            elif kind == "page":
                self._pages[values[0]].extend(values[1])
        for _, kind, values in step.events:
            if kind == "results":
                results = self._results(values[0])
        plan = self.scheduler.tick(results)
        self.scheduler.drain_updates()
        if plan:
            self._in_flight[plan.tick] = plan
        for task_id in self._endings:
            self._pages.pop(task_id, None)
        self._endings.clear()
        return self._told

    def _before(self, events: Sequence[Event]) -> None:
        contents = {values[0]: values[1:] for _, kind, values in events if kind == "content"}
        dropped = False
        for _, kind, values in events:
            if kind == "arrive":
                self.scheduler.add(self._task(values, *contents[values[0]]))
            elif kind == "abort":
                self.scheduler.abort(values[0])
            elif kind == "grammar":
                self._grammar_done(*values[:2])
            elif kind == "evict" and not dropped:
                dropped = True  # between ticks only as a whole
                self.books.drop_cached()

    def _grammar_done(self, task_id: int, error: str | None) -> None:
        if error is None:
            task = self.scheduler.tasks[task_id]
            for choice in (task, *task.siblings):
                choice.matcher = _MATCHER  # type: ignore[assignment]
        self.scheduler.grammar_done(task_id, error)

    def _task(
        self, arrived: tuple[Any, ...], pages: list[int], whole: bool, structured: bool
    ) -> Task:
        task_id, request, n_prompt, max_tokens, priority, _, choices = arrived[:7]
        prompt = synthetic_prompt(n_prompt, pages, self.header.page_size)
        params = SamplingParams(
            max_tokens=max_tokens,
            prompt_logprobs=0 if whole else None,
            pooling="last" if max_tokens == 0 and not whole else None,
            structured=StructuredOutput(json_object=True) if structured else None,
        )
        tasks = [
            Task(
                id=number,
                request_id=request,
                prompt=prompt,
                params=params,
                max_tokens=max_tokens,
                seed=0,
                priority=priority,
                index=index,
            )
            for index, number in enumerate((task_id, *choices))
        ]
        for task in tasks:
            self._pages[task.id] = deque()
            task.stop_check = self._stop_check(task)
        tasks[0].siblings = tasks[1:]
        self.n_tasks += len(tasks)
        return tasks[0]

    def _stop_check(self, task: Task) -> Any:
        def recorded(token: int) -> str | None:
            ending = self._endings.get(task.id)
            if ending is None or ending.n_output != task.n_output:
                return None
            if ending.reason == "error":
                raise _Recorded
            return "as recorded" if ending.reason == "stop" else None

        return recorded

    def _results(self, tick: int) -> Results:
        plan = self._in_flight.pop(tick, None)
        if plan is None:
            raise ValueError(f"results of tick {tick} came, but no plan of it is on its way")
        return Results(plan, [self._outcome(entry) for entry in plan.entries.values()])

    def _outcome(self, entry: Entry) -> Outcome:
        task = entry.task
        ending = self._endings.get(task.id)
        if ending is not None and ending == ("error", task.n_output):
            return Outcome(error="as recorded")
        if not entry.samples:
            return NOTHING
        pages = self._pages.get(task.id)
        ends_page = (len(task.tokens) + 1) % self.header.page_size == 0
        return Outcome(pages.popleft() if ends_page and pages else 0)


def replay(recording: Recording, check_every: int = 256) -> Replayed:
    """Replay all steps and compare every decision; stops at the first difference.

    The books are checked whole every `check_every` ticks and at the end. Raises ValueError if the
    recording does not begin where its engine began.
    """
    recording.require_whole("replay")
    header = recording.header
    replayer = Replayer(header)
    n_ticks = n_events = 0
    difference = None
    for step in recording.steps():
        expected = [event for event in (*step.before, *step.events) if event.kind not in GIVEN]
        got = [event for event in replayer.step(step) if event.kind in header.kinds]
        if step.events and step.events[-1].kind != "tick":
            got = got[: len(expected)]  # the engine ended within this tick
        n_events += len(expected)
        n_ticks += bool(step.events)
        difference = first_difference(header, step.tick, expected, got)
        if difference is not None:
            break
        if step.events and step.tick % check_every == 0:
            replayer.scheduler.check()
    if difference is None:
        replayer.scheduler.check()
    tables = {task.id: task.page_table for task in replayer.scheduler.running.values()}
    return Replayed(
        n_ticks,
        n_events,
        replayer.n_tasks,
        difference,
        tables,
        replayer.scheduler.n_preemptions,
        dict(replayer.scheduler.wait_ticks),
    )


def first_difference(
    header: Header, tick: int, expected: Sequence[Event], got: Sequence[Event]
) -> Difference | None:
    """Compares as many values of an event as the recording's table of kinds has; times are given.

    So a kind or a value that is younger than the recording does not make it differ.
    """
    for place in range(max(len(expected), len(got))):
        theirs = expected[place] if place < len(expected) else None
        ours = got[place] if place < len(got) else None
        if (
            theirs is None
            or ours is None
            or theirs[:2] != ours[:2]
            or _decided(header, theirs) != _decided(header, ours)
        ):
            return Difference(tick, place, theirs, ours)
    return None


def _decided(header: Header, event: Event) -> list[Any]:
    names = header.kinds[event.kind]
    return [v for name, v in zip(names, event.values) if name not in TIMES]
