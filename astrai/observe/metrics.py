"""Prometheus metrics of the engine from its events, and of HTTP from the edge."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from astrai.inference.task import WAIT_REASONS
from astrai.observe.ticks import Batch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A client may send any word as its method.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Powers of about two and a half: fine enough for a percentile, few enough to keep.
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SLOW = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class _Histogram:
    """Counts by upper bound, as Prometheus cumulates them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, n: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += n
        self.total += value * n

    def family(self, name: str, text: str) -> Metric:
        family = HistogramMetricFamily(name, text)
        family.add_metric((), *self.cumulated())
        return family

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        buckets: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts):
            below += count
            buckets.append((bound, below))
        return buckets, self.total


class _Pages(NamedTuple):
    free: int
    cached: int
    held: int


class _Live(NamedTuple):
    arrived: float
    n_prompt: int
    choices: tuple[int, ...]


class Metrics:
    """What a scrape shows: the numbers of one tick, all of the same one.

    Its memory is a few numbers per live task and nothing per ended one. A decode step that runs the
    same tasks as the one before costs one observation, not one per task.

    Owns its registry and its numbers, and the lock between the thread of `apply` and a scrape.
    `apply` takes the events of whole ticks.
    """

    def __init__(self, n_pages: Callable[[], int], n_slots: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._n_pages = n_pages
        self._n_slots = n_slots
        self._tick = 0
        self._last_time: float | None = None  # of the last tick, while there is work
        self._pages: _Pages | None = None
        self._n_running = 0
        self._n_waiting = 0
        self._blocked: str | None = None  # why the head of the queue waits, if anybody waits
        self._queued: set[int] = set()  # in the queue: not the choices that their first holds back
        self._gated: set[int] = set()  # beside the queue: each waits for its grammar
        self._counted = True  # whether the waits of this tick are counted
        self._live: dict[int, _Live] = {}
        self._fresh: set[int] = set()  # live and without a first token
        self._decoding: dict[int, None] = {}  # the tasks of the last tick's decode step
        self._launched: dict[int, float] = {}  # others: when their last token was launched
        self._n_output_seen = 0
        self._counts: Counter[str] = Counter()
        self._waits: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._first_token = _Histogram(_SLOW)
        self._inter_token = _Histogram(_FAST)
        self._end_to_end = _Histogram(_SLOW)
        self._queue = _Histogram(_SLOW)
        self._tick_time = _Histogram(_FAST)
        self._http_time = _Histogram(_SLOW)
        self._handlers: dict[str, Callable[..., None]] = {
            "arrive": self._arrive,
            "refuse": self._refuse,
            "wait": self._wait,
            "grammar": self._grammar,
            "admit": self._admit,
            "prefix": self._prefix,
            "evict": self._evict,
            "preempt": self._preempt,
            "first_token": self._on_first_token,
            "end": self._end,
            "snapshot": self._snapshot,
        }
        self.registry.register(_Adapter(self))

    def text(self) -> bytes:
        """The exposition of now. Any thread."""
        return generate_latest(self.registry)

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is the pattern, not the path: few values."""
        labels = (method if method in _METHODS else "other", route, str(status))
        with self._lock:
            self._http[labels] += 1
            self._http_time.observe(seconds)

    # ── what is heard ───────────────────────────────────────────────────────────────────────────

    def apply(self, tick: int, batch: Batch) -> None:
        """All events of one tick."""
        with self._lock:
            if tick < self._tick:
                self._restarted()
            self._tick = tick
            self._counted = False
            decoded: list[int] = []
            prefilled: list[int] = []
            handlers = self._handlers
            for kind, values in batch:
                if kind == "decode":
                    decoded = values[0]
                elif kind == "prefill":
                    prefilled.append(values[0])
                    self._counts["prefill_tokens"] += values[2]
                elif kind == "tick":
                    self._on_tick(decoded, prefilled, *values)
                elif (handle := handlers.get(kind)) is not None:
                    handle(*values)

    def _restarted(self) -> None:
        """Ticks begin anew: what lived in the old engine is gone, and nobody said how it ended."""
        self._forget(list(self._live))
        self._decoding.clear()
        self._n_output_seen = self._n_running = self._n_waiting = 0
        self._last_time = None

    def _snapshot(self, time: float, config: Any, tasks: list[dict[str, Any]], *rest: Any) -> None:
        """Every task that lives: another engine's tasks ended unheard."""
        self._forget(list(self._live.keys() - {task["task"] for task in tasks}))

    def _forget(self, tasks: list[int]) -> None:
        for task in tasks:
            self._ends["error"] += 1
            del self._live[task]
            self._fresh.discard(task)
            self._queued.discard(task)
            self._gated.discard(task)
            self._launched.pop(task, None)

    def _on_tick(
        self,
        decoded: list[int],
        prefilled: list[int],
        time: float,
        n_running: int,
        n_waiting: int,
        free: int,
        cached: int,
        held: int,
        n_output: int,
        *rest: Any,
    ) -> None:
        self._counts["ticks"] += 1
        self._counts["output_tokens"] += n_output - self._n_output_seen
        self._n_output_seen = n_output
        self._pages = _Pages(free, cached, held)
        self._n_running, self._n_waiting = n_running, n_waiting
        self._count_waits()
        if self._last_time is not None:
            self._tick_time.observe(time - self._last_time)
        if prefilled:
            for task in prefilled:
                if task in self._fresh:
                    self._launched[task] = time
        self._observe_gaps(decoded, time)
        busy = n_running or n_waiting
        self._last_time = time if busy else None

    def _count_waits(self) -> None:
        """After the tick's Refill: the queue is empty, or waits for what blocks its head."""
        if self._counted:
            return
        self._counted = True
        self._waits["grammar"] += bool(self._gated)
        if not self._queued:
            self._blocked = None
        elif self._blocked is not None:
            self._waits[self._blocked] += 1

    def _observe_gaps(self, decoded: list[int], time: float) -> None:
        """The time since each task's token before; most stand in the step before as well."""
        decoding, before = dict.fromkeys(decoded), self._last_time
        last = self._decoding
        new: Any = decoding.keys() - last.keys() if decoding.keys() != last.keys() else ()
        if before is None:
            new = decoding.keys()
        elif same := len(decoding) - len(new):
            self._inter_token.observe(time - before, same)
        for task in new:
            if (launched := self._launched.pop(task, None)) is not None:
                self._inter_token.observe(time - launched)
        if before is not None and (new or len(decoding) != len(last)):
            for task in last.keys() - decoding.keys():
                if task in self._live:
                    self._launched[task] = before
        self._decoding = decoding

    def _arrive(
        self,
        task: int,
        request: str,
        n_prompt: int,
        max_tokens: int,
        priority: int,
        time: float,
        choices: list[int],
        *rest: Any,
    ) -> None:
        self._counts["arrived"] += 1 + len(choices)
        self._counts["prompt_tokens"] += n_prompt
        self._live[task] = _Live(time, n_prompt, tuple(choices))
        for choice in choices:
            self._live[choice] = _Live(time, n_prompt, ())
        self._fresh.update((task, *choices))
        self._queued.add(task)

    def _refuse(self, *rest: Any) -> None:
        self._counts["refused"] += 1

    def _wait(self, reason: str, head: int, *rest: Any) -> None:
        if reason != "grammar":
            self._blocked = reason
        else:
            self._queued.discard(head)
            self._gated.add(head)

    def _grammar(self, task: int, error: str | None, *rest: Any) -> None:
        self._gated.discard(task)
        if error is None:
            self._queued.add(task)

    def _admit(
        self, task: int, slot: int, n_cached: int, waits: dict[str, int], time: float, *rest: Any
    ) -> None:
        self._queued.discard(task)
        if task in self._fresh and task not in self._launched and (live := self._live.get(task)):
            self._queue.observe(time - live.arrived)
            self._launched[task] = time

    def _prefix(self, task: int, n_hit: int, n_full: int, *rest: Any) -> None:
        self._counts["prefix_hit"] += n_hit
        self._counts["prefix_asked"] += n_full

    def _evict(self, frames: list[int], *rest: Any) -> None:
        self._counts["evicted"] += len(frames)

    def _preempt(self, task: int, *rest: Any) -> None:
        self._count_waits()  # this tick's Refill is over: the victim waits from the next one on
        self._counts["preempted"] += 1
        self._queued.add(task)

    def _on_first_token(self, task: int, time: float, *rest: Any) -> None:
        self._fresh.discard(task)
        if (live := self._live.get(task)) is not None:
            self._first_token.observe(time - live.arrived)
            self._release(live)

    def _end(self, task: int, reason: str, n_output: int, time: float, *rest: Any) -> None:
        self._ends[reason] += 1
        self._queued.discard(task)
        self._gated.discard(task)
        self._fresh.discard(task)
        self._launched.pop(task, None)
        if (live := self._live.pop(task, None)) is not None:
            self._end_to_end.observe(time - live.arrived)
            if not n_output:  # its choices go on without it
                self._release(live)

    def _release(self, leader: _Live) -> None:
        """Its other choices join the queue, but for those already heard to wait for a grammar."""
        self._queued.update(
            choice
            for choice in leader.choices
            if choice in self._live and choice not in self._gated
        )

    # ── what is asked ───────────────────────────────────────────────────────────────────────────

    def families(self) -> Iterator[Metric]:
        """Every metric, the numbers of one and the same tick."""
        n_pages, n_slots = self._n_pages(), self._n_slots()
        with self._lock:
            yield from self._page_families(n_pages)
            yield from self._task_families(n_slots)
            yield from self._token_families()
            yield from self._time_families()
            yield from self._http_families()

    def _page_families(self, n_pages: int) -> Iterator[Metric]:
        equation = (
            "astrai_pages_free + astrai_pages_cached + astrai_pages_held = astrai_pages_total"
        )
        pages = self._pages or _Pages(n_pages, 0, 0)
        yield _gauge("astrai_pages_total", f"Page frames of the pool. {equation}", n_pages)
        yield _gauge(
            "astrai_pages_free",
            f"Page frames nobody holds and no prefix indexes. {equation}",
            pages.free,
        )
        yield _gauge(
            "astrai_pages_cached",
            f"Page frames with refs = 0 that a prefix can still hit. {equation}",
            pages.cached,
        )
        yield _gauge("astrai_pages_held", f"Page frames with refs > 0. {equation}", pages.held)
        yield _counter(
            "astrai_pages_evicted",
            "Cached page frames given to another task.",
            self._counts["evicted"],
        )

    def _task_families(self, n_slots: int) -> Iterator[Metric]:
        slots = "astrai_slots_free + astrai_slots_used = astrai_slots_total"
        running = f"{slots}; astrai_slots_used = astrai_tasks_running"
        yield _gauge("astrai_slots_total", f"Tasks that can run at once. {slots}", n_slots)
        yield _gauge(
            "astrai_slots_used", f"Slots that a running task owns. {running}", self._n_running
        )
        yield _gauge(
            "astrai_slots_free", f"Slots that no task owns. {slots}", n_slots - self._n_running
        )
        yield _gauge(
            "astrai_tasks_running",
            f"Tasks with a slot: a request with n = 3 has three. {running}",
            self._n_running,
        )
        waiting = GaugeMetricFamily(
            "astrai_tasks_waiting",
            "Tasks without a slot, by what the head of the queue, and so all behind it, waits for; "
            '"choice": until the first choice of its request has computed the prompt. '
            "sum over reason = arrived - ended - running",
            labels=("reason",),
        )
        queued = dict.fromkeys((*WAIT_REASONS, "choice"), 0)
        queued["grammar"] = len(self._gated)
        if self._blocked is not None:
            queued[self._blocked] = min(len(self._queued), self._n_waiting)
        queued["choice"] = self._n_waiting - sum(queued.values())
        for reason, n in queued.items():
            waiting.add_metric((reason,), n)
        yield waiting
        yield _labelled(
            "astrai_wait_ticks",
            "Ticks in which the queue waited, by reason.",
            "reason",
            dict.fromkeys(WAIT_REASONS, 0) | self._waits,
        )
        yield _labelled(
            "astrai_tasks_ended",
            "Tasks that ended, by finish reason: a request with n = 3 counts three.",
            "reason",
            dict.fromkeys(("stop", "length", "abort", "error"), 0) | self._ends,
        )
        yield _counter(
            "astrai_tasks_arrived", "Tasks that entered the engine.", self._counts["arrived"]
        )
        yield _counter(
            "astrai_requests_refused", "Requests that the loop refused.", self._counts["refused"]
        )
        yield _counter(
            "astrai_preemptions",
            "Times a task lost its pages to an older one.",
            self._counts["preempted"],
        )

    def _token_families(self) -> Iterator[Metric]:
        counts = self._counts
        yield _counter(
            "astrai_prompt_tokens",
            "Prompt tokens of the requests that arrived; once however many choices.",
            counts["prompt_tokens"],
        )
        yield _counter(
            "astrai_prefill_tokens",
            "Positions computed by prefill chunks, those after a preemption included.",
            counts["prefill_tokens"],
        )
        yield _counter("astrai_output_tokens", "Tokens sampled and kept.", counts["output_tokens"])
        yield _counter(
            "astrai_prefix_hit_tokens",
            "Positions that admission found in the prefix cache.",
            counts["prefix_hit"],
        )
        yield _counter(
            "astrai_prefix_asked_tokens",
            "Positions in full pages that admission looked for in it. "
            "hit rate = astrai_prefix_hit_tokens_total / astrai_prefix_asked_tokens_total",
            counts["prefix_asked"],
        )

    def _time_families(self) -> Iterator[Metric]:
        yield self._queue.family(
            "astrai_queue_seconds", "From arrival to the first admission of a task."
        )
        yield self._first_token.family(
            "astrai_time_to_first_token_seconds", "From arrival to the first token of a task."
        )
        yield self._inter_token.family(
            "astrai_inter_token_seconds", "Between the launches of successive tokens of a task."
        )
        yield self._end_to_end.family(
            "astrai_end_to_end_seconds", "From arrival to the end of a task."
        )
        yield self._tick_time.family(
            "astrai_tick_seconds", "Between the plans of successive ticks, while there is work."
        )
        yield _counter("astrai_ticks", "Turns of the loop.", self._counts["ticks"])

    def _http_families(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "astrai_http_requests",
            "Answers, by method, route and status.",
            labels=("method", "route", "status"),
        )
        for labels, n in sorted(self._http.items()):
            family.add_metric(labels, n)
        yield family
        yield self._http_time.family(
            "astrai_http_seconds", "From a request's headers to the end of its answer."
        )


class _Adapter(Collector):
    """Registers without being asked for its metrics: they have the names they have."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        return list(self._metrics.families())


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
