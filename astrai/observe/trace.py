"""A recording as a trace for Perfetto and Chrome: phases, launches, slots, requests, counters.

The format is the Trace Event Format's JSON object: complete events ("X", with `ts` and `dur` in
microseconds), counters ("C"), instants ("i") and names of processes and threads ("M"). A track is a
(pid, tid); within one the events come in order of time and do not overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from astrai.observe.recording import Recording, Step

ENGINE, SLOTS, REQUESTS, COUNTERS = 1, 2, 3, 4
PHASES, HOST, DEVICE = 1, 2, 3
_PROCESSES = {ENGINE: "engine", SLOTS: "slots", REQUESTS: "requests", COUNTERS: "pool and queue"}
_THREADS = {PHASES: "phases of the tick", HOST: "launch and read", DEVICE: "device"}

Record = dict[str, Any]


class _Span(NamedTuple):
    """Where a task is, and since when (seconds)."""

    state: str  # queued, prefill, decode, preempted
    since: float


class _Moments(NamedTuple):
    """The ends of the phases of one tick, in seconds."""

    began: float
    cleaned: float
    refilled: float
    prefilled: float
    decoded: float


class Tracer:
    """Turns steps into trace events, one after the other.

    Tasks that were admitted before the first step are not drawn. Owns what is open: the present
    span of each task and its slot.
    """

    def __init__(self) -> None:
        self._spans: dict[int, _Span] = {}
        self._slots: dict[int, int] = {}  # task → slot
        self._requests: dict[int, str] = {}  # task → how its track is called
        self._named: set[int] = set()  # slots whose track has a name
        self._work: dict[int, Record] = {}  # tick → what its plan does
        self._launched: dict[int, float] = {}
        self._device_free = 0.0
        self._counters: dict[str, Record] = {}
        self._now = 0.0

    def begin(self) -> Iterator[Record]:
        """Names of the tracks that are always there."""
        for pid, name in _PROCESSES.items():
            yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
            order = {"sort_index": pid}
            yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": order}
        for tid, name in _THREADS.items():
            yield _name_of_track(ENGINE, tid, name)

    def step(self, step: Step) -> Iterator[Record]:
        """Events of one turn of the loop."""
        for _, kind, values in step.before:
            if kind == "arrive":
                yield from self._arrive(*values[:7])
            elif kind == "launch":
                plan, began, ended = values
                self._launched[plan] = began
                yield _complete(ENGINE, HOST, "launch", began, ended, {"plan": plan})
            elif kind == "read":
                yield from self._read(*values)
            elif kind == "end":  # refused with its grammar
                yield from self._end(*values[:4])
        moments = _moments(step)
        if moments is None:
            return
        yield from _phases(step.tick, moments)
        for _, kind, values in step.events:
            yield from self._decide(kind, values, moments, step.tick)
        self._now = moments.decoded

    def end(self) -> Iterator[Record]:
        """What is still open at the end of the recording."""
        for task in list(self._spans):
            yield from self._leave(task, self._now)

    # ── tasks ─────────────────────────────────────────────────────────────────────────────────────

    def _arrive(
        self,
        task: int,
        request: str,
        n_prompt: int,
        max_tokens: int,
        priority: int,
        at: float,
        choices: list[int],
    ) -> Iterator[Record]:
        for choice in (task, *choices):
            name = request if choice == task else f"{request} (task {choice})"
            self._requests[choice] = name
            self._spans[choice] = _Span("queued", at)
            yield _name_of_track(REQUESTS, choice + 1, name)
        about = {"n_prompt": n_prompt, "max_tokens": max_tokens, "priority": priority}
        yield _instant(REQUESTS, task + 1, "arrives", at, about)

    def _decide(
        self, kind: str, values: tuple[Any, ...], moments: _Moments, tick: int
    ) -> Iterator[Record]:
        if kind == "end":
            yield from self._end(*values[:4])
        elif kind == "admit":
            task, slot, n_computed = values[:3]
            if task in self._spans:
                yield from self._enter(task, "prefill", moments.refilled, n_computed=n_computed)
                self._slots[task] = slot
                if slot not in self._named:
                    self._named.add(slot)
                    yield _name_of_track(SLOTS, slot + 1, f"slot {slot}")
        elif kind == "prefill":
            work = self._work.setdefault(tick, {"prefill tokens": 0, "decode rows": 0})
            work["prefill tokens"] += values[2]
        elif kind == "decode":
            work = self._work.setdefault(tick, {"prefill tokens": 0, "decode rows": 0})
            work["decode rows"] = len(values[0])
            for task in values[0]:
                if (span := self._spans.get(task)) and span.state == "prefill":
                    yield from self._enter(task, "decode", moments.prefilled)
        elif kind == "preempt":
            task, by = values
            if task in self._spans:
                yield from self._enter(task, "preempted", moments.decoded, by=by)
        elif kind == "tick":
            _, n_running, n_waiting, free, cached, held = values[:6]
            pages = {"held": held, "cached": cached, "free": free}
            yield from self._count("pages", pages, moments.decoded)
            tasks = {"running": n_running, "waiting": n_waiting}
            yield from self._count("tasks", tasks, moments.decoded)

    def _end(self, task: int, reason: str, n_output: int, at: float) -> Iterator[Record]:
        if task in self._spans:
            yield from self._leave(task, at)
            about = {"reason": reason, "n_output": n_output}
            yield _instant(REQUESTS, task + 1, f"ends: {reason}", at, about)
            del self._requests[task]

    def _enter(self, task: int, state: str, at: float, **about: Any) -> Iterator[Record]:
        yield from self._leave(task, at, **about)
        self._spans[task] = _Span(state, at)

    def _leave(self, task: int, at: float, **about: Any) -> Iterator[Record]:
        """Draw the span that ends now, in the request's track and in its slot's."""
        state, since = self._spans.pop(task)
        yield _complete(REQUESTS, task + 1, state, since, at, about)
        if state in ("prefill", "decode"):
            slot, name = self._slots[task], f"{self._requests[task]}: {state}"
            yield _complete(SLOTS, slot + 1, name, since, at, {"task": task})

    def _read(self, plan: int, began: float, ended: float) -> Iterator[Record]:
        yield _complete(ENGINE, HOST, "read", began, ended, {"plan": plan})
        work = self._work.pop(plan, {})
        launched = self._launched.pop(plan, None)
        if launched is not None:
            start = max(launched, self._device_free)
            self._device_free = ended
            yield _complete(ENGINE, DEVICE, f"plan {plan}", start, ended, work)

    def _count(self, name: str, values: Record, at: float) -> Iterator[Record]:
        if self._counters.get(name) != values:
            self._counters[name] = values
            track = {"ph": "C", "pid": COUNTERS, "tid": 0, "name": name}
            yield {**track, "ts": _us(at), "args": values}


def trace_events(recording: Recording, first: int = 0, last: int | None = None) -> Iterator[Record]:
    """The trace of the ticks `first` to `last`, in an order that is in time within each track."""
    tracer = Tracer()
    yield from tracer.begin()
    for step in recording.steps():
        if last is not None and step.tick > last:
            break
        if step.tick >= first:
            yield from tracer.step(step)
    yield from tracer.end()


def write_trace(recording: Recording, target: Path, first: int = 0, last: int | None = None) -> int:
    """Write the trace as JSON, event by event; returns how many there are."""
    header = recording.header
    about = {"astrai": header.version, "pages": header.n_pages, **header.about}
    n = 0
    with target.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps(about))
        file.write(',"traceEvents":[')
        for event in trace_events(recording, first, last):
            file.write(",\n" if n else "\n")
            file.write(json.dumps(event, separators=(",", ":")))
            n += 1
        file.write("\n]}\n")
    return n


def _moments(step: Step) -> _Moments | None:
    phases: tuple[float, float, float, float] | None = None
    now: float | None = None
    for _, kind, values in step.events:
        if kind == "phases":
            phases = values
        elif kind == "tick":
            now = values[0]
    return None if phases is None or now is None else _Moments(*phases, now)


def _phases(tick: int, moments: _Moments) -> Iterator[Record]:
    names = ("cleanup", "refill", "prefill", "decode")
    for name, began, ended in zip(names, moments, moments[1:]):
        yield _complete(ENGINE, PHASES, name, began, ended, {"tick": tick})


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _complete(pid: int, tid: int, name: str, began: float, ended: float, about: Record) -> Record:
    ts = _us(began)
    dur = max(round(_us(ended) - ts, 3), 0.0)
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": about
    }  # fmt: skip


def _instant(pid: int, tid: int, name: str, at: float, about: Record) -> Record:
    return {
        "ph": "i", "pid": pid, "tid": tid, "name": name, "ts": _us(at), "s": "t", "args": about
    }  # fmt: skip


def _name_of_track(pid: int, tid: int, name: str) -> Record:
    return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
