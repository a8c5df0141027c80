"""A recorded load under another configuration: what would have been better, and what worse."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from astrai.config import SchedulerConfig
from astrai.observe.recording import Recording
from astrai.observe.replay import Replayed, replay, synthetic_prompt
from astrai.observe.simulate import (
    Fit,
    Report,
    Request,
    Setting,
    Simulator,
    fit,
    percentiles,
    steps_of,
)


class Change(NamedTuple):
    """What is to be different; None: as recorded."""

    n_pages: int | None = None
    page_size: int | None = None
    max_slots: int | None = None
    prefill_budget: int | None = None
    ageing_ticks: int | None = None
    batching: str | None = None
    prefix_cache: bool | None = None
    ignore_priority: bool = False


# Events of which the last one for each task tells what became of it.
_OF_TASKS = ("arrive", "content", "first_token", "end")


class WhatIf(NamedTuple):
    """One load three times: as it was measured, simulated as it was, and simulated otherwise."""

    fit: Fit
    n_left_out: int
    measured: Report
    recorded: Report
    other: Report

    def lines(self) -> list[str]:
        left_out = f" ({self.n_left_out} that said nothing are left out)" if self.n_left_out else ""
        reports = (self.measured, self.recorded, self.other)
        return [
            str(self.fit),
            f"{self.other.n_requests} requests, each when it came{left_out}",
            f"{'':<28}{'measured':>12}{'simulated':>12}{'what if':>12}",
            *(f"{name:<28}" + "".join(f"{say(r):>12}" for r in reports) for name, say in _ROWS),
        ]


_ROWS: list[tuple[str, Callable[[Report], str]]] = [
    ("ticks", lambda r: str(r.n_ticks)),
    ("seconds", lambda r: f"{r.seconds:.2f}"),
    ("tokens a second", lambda r: f"{r.tokens_per_second:.1f}"),
    ("first token p50 ms", lambda r: f"{1e3 * r.ttft[0]:.1f}"),
    ("first token p99 ms", lambda r: f"{1e3 * r.ttft[-1]:.1f}"),
    ("between tokens p50 ms", lambda r: f"{1e3 * r.inter_token[0]:.1f}"),
    ("between tokens p99 ms", lambda r: f"{1e3 * r.inter_token[-1]:.1f}"),
    ("whole request p50 ms", lambda r: f"{1e3 * r.e2e[0]:.1f}"),
    ("whole request p99 ms", lambda r: f"{1e3 * r.e2e[-1]:.1f}"),
    ("preemptions", lambda r: str(r.n_preemptions)),
    ("prompt tokens from cache", lambda r: str(r.cached_tokens)),
    ("ticks waiting for slots", lambda r: str(r.waits.get("slots", 0))),
    ("ticks waiting for pages", lambda r: str(r.waits.get("pages", 0))),
    ("ticks waiting for prefill", lambda r: str(r.waits.get("prefill", 0))),
    ("slots used %", lambda r: f"{100 * r.occupancy:.1f}"),
    ("pages held at most", lambda r: str(r.pages_held)),
    ("could never fit", lambda r: str(r.n_refused)),
]


def what_if(recording: Recording, change: Change) -> WhatIf:
    """Simulate the recorded load as it was and with `change`, with a step time fitted to it.

    Raises ValueError if the recording is not whole, if replaying it gives a difference, or if pages
    could not be told apart: a page size must be a multiple of the recorded one.
    """
    replayed = replay(recording)
    if replayed.difference is not None:
        raise ValueError(f"{recording.path} is not what happens now: {replayed.difference}")
    header = recording.header
    fitted = fit(steps_of(recording))
    page_size = change.page_size or header.page_size
    if page_size % header.page_size:
        raise ValueError(
            f"{page_size = }, expected a multiple of {header.page_size}: the recording tells "
            "contents apart by whole pages"
        )
    load = _Load(recording)
    as_it_was = Setting(
        header.scheduler, header.n_pages, header.page_size, header.prefix_cache, header.depth
    )
    same_pool = header.n_pages * header.page_size // page_size
    prefix_cache = header.prefix_cache if change.prefix_cache is None else change.prefix_cache
    changed = as_it_was._replace(
        scheduler=_changed(header.scheduler, change),
        n_pages=change.n_pages or same_pool,
        page_size=page_size,
        prefix_cache=prefix_cache,
    )
    requests = load.requests
    if change.ignore_priority:
        requests = [request._replace(priority=0) for request in requests]
    return WhatIf(
        fitted,
        load.n_left_out,
        load.measured(replayed),
        Simulator(as_it_was, fitted.step_time).run(load.requests),
        Simulator(changed, fitted.step_time).run(requests),
    )


def _changed(config: SchedulerConfig, change: Change) -> SchedulerConfig:
    names = ("max_slots", "prefill_budget", "ageing_ticks", "batching")
    return replace(config, **{n: v for n in names if (v := getattr(change, n)) is not None})


class _Load:
    """The arrivals of a recording with what they said, and what became of them.

    An aborted request counts with what it had said by then; one, or a choice of one, that said
    nothing is left out.
    """

    def __init__(self, recording: Recording) -> None:
        self.header = recording.header
        self._last: dict[str, dict[int, tuple[Any, ...]]] = {kind: {} for kind in _OF_TASKS}
        self._n_cached: dict[int, int] = {}
        self._pages: dict[int, list[int]] = {}
        self._n_launches = self._n_entries = self._held = 0
        self._seconds = 0.0
        for step in recording.steps():
            n_entries = 0
            for _, kind, values in (*step.before, *step.events):
                if kind in _OF_TASKS:
                    self._last[kind][values[0]] = values
                elif kind == "page":
                    self._pages.setdefault(values[0], []).extend(values[1])
                elif kind == "admit":
                    self._n_cached.setdefault(values[0], values[2])
                elif kind == "prefill":
                    n_entries += 1
                elif kind == "decode":
                    n_entries += len(values[0])
                elif kind == "tick":
                    self._seconds, self._held = values[0], max(self._held, values[5])
            self._n_launches += n_entries > 0
            self._n_entries += n_entries
        self.n_left_out = 0
        self.requests = list(self._requests())

    def _requests(self) -> Iterator[Request]:
        for task, values in self._last["arrive"].items():
            _, _, n_prompt, _, priority, at, choices = values[:7]
            spoke = [choice for choice in (task, *choices) if self._n_output(choice)]
            self.n_left_out += 1 + len(choices) - len(spoke)
            if not spoke:
                continue
            _, pages, whole, _ = self._last["content"][task]
            yield Request(
                at=at,
                n_prompt=n_prompt,
                outputs=tuple(self._n_output(choice) for choice in spoke),
                priority=priority,
                prompt=synthetic_prompt(n_prompt, pages, self.header.page_size),
                whole=whole,
                said=tuple(self._said(choice, n_prompt) for choice in spoke),
            )

    def _n_output(self, task: int) -> int:
        end = self._last["end"].get(task)
        return 0 if end is None else end[2]

    def _said(self, task: int, n_prompt: int) -> dict[int, int]:
        """Position → hash, where an output ends a page."""
        size = self.header.page_size
        first = n_prompt // size
        pages = self._pages.get(task, ())
        return {(first + i + 1) * size - 1: page for i, page in enumerate(pages)}

    def measured(self, replayed: Replayed) -> Report:
        """What the recorded times say."""
        ttft, e2e, inter = array("d"), array("d"), array("d")
        n_cached = n_output = 0
        for task, values in self._last["arrive"].items():
            for choice in (task, *values[6]):
                if not self._n_output(choice):
                    continue
                _, _, n_said, ended = self._last["end"][choice][:4]
                first = self._last["first_token"][choice][1]
                ttft.append(first - values[5])
                e2e.append(ended - values[5])
                if n_said > 1:
                    inter.append((ended - first) / (n_said - 1))
                n_output += n_said
            if self._n_output(task):
                n_cached += min(self._n_cached[task], values[2])
        slots = self.header.scheduler.max_slots
        return Report(
            n_requests=len(self.requests),
            n_refused=0,
            tokens_in=sum(request.n_prompt for request in self.requests),
            tokens_out=n_output,
            seconds=self._seconds,
            n_ticks=replayed.n_ticks,
            n_preemptions=replayed.n_preemptions,
            cached_tokens=n_cached,
            waits=replayed.waits,
            occupancy=self._n_entries / max(self._n_launches * slots, 1),
            pages_held=self._held,
            ttft=percentiles(ttft),
            e2e=percentiles(e2e),
            inter_token=percentiles(inter),
            host_seconds=0.0,
        )
