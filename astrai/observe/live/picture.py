"""What the engine's events say about its tasks, pages and phases, as plain data for a page."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "preempted", "prefill", "decode", "ended"]

N_COLOURS = 8  # of the page's palette
KEEP_ENDED = 64  # ended tasks that the timeline still shows
KEEP_SPANS = 48  # pieces of one task's timeline
KEEP_MARKS = 32  # happenings told in one frame
FREE, CACHED = 0, -1  # what `pages` says of a frame that nobody holds


@dataclass(slots=True)
class TaskView:
    """A task as the page shows it; `spans` are [state, begin, end or None] in engine seconds."""

    id: int
    request: str
    n_prompt: int
    max_tokens: int
    priority: int = 0
    state: State = "queued"
    slot: int = -1
    colour: int = -1  # given at the first admission, kept to the end
    computed: int = 0
    seated_at: int = 0  # what was computed when it was last admitted
    n_output: int = 0
    n_cached: int = 0
    n_preempted: int = 0
    reason: str | None = None  # why it ended
    arrived: float = 0.0
    first_token: float | None = None
    spans: list[list[Any]] = field(default_factory=list)
    table: list[int] = field(default_factory=list)

    def row(self) -> list[Any]:
        """Everything but the page table, in the order that the page reads."""
        return [
            self.id,
            self.request,
            self.n_prompt,
            self.max_tokens,
            self.priority,
            self.state,
            self.slot,
            self.colour,
            self.computed,
            self.n_output,
            self.n_cached,
            self.n_preempted,
            self.reason,
            self.arrived,
            self.first_token,
            self.spans,
        ]


class Picture:
    """The engine's state as its events tell it, from a "snapshot" event on, and what changed since
    the last frame.

    After each tick `free + cached + held` derived here equals what the scheduler counted.

    Owns derived data only, bounded by the pages, the tasks that have not ended and KEEP_ENDED.
    """

    def __init__(self) -> None:
        self.known = False  # nothing is, before the first snapshot
        self.config: dict[str, Any] = {}
        self.tick = 0
        self._reset()

    def _reset(self) -> None:
        self.time = 0.0  # of the engine's clock, in seconds
        self.n_running = self.n_waiting = 0
        self.n_output = 0  # tokens of all tasks since the engine started
        self.n_ended = 0  # tasks since the snapshot
        self.counts = (0, 0, 0)  # free, cached, held: the scheduler's own
        self.wait: str | None = None  # why the head of the queue waits
        self.groups: list[list[int]] = []
        self.tasks: dict[int, TaskView] = {}  # in order of arrival
        self.pages: list[int] = []  # per frame: refs, FREE or CACHED
        self._indexed: set[int] = set()
        self._ended: deque[int] = deque()
        self._colours: Counter[int] = Counter()
        self._decoded: list[int] = []
        self._unstamped: list[tuple[list[Any], int]] = []  # (span, which end) of the present tick
        self._fresh = True  # everything changed
        self._clear_changes()

    def __call__(self, tick: int, kind: str, values: tuple[Any, ...]) -> None:
        """Read one event. Kinds that are not drawn are passed over."""
        if not self.known and kind != "snapshot":
            return
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            self.tick = tick
            handler(*values)

    # ── what the page is told ─────────────────────────────────────────────────────────────────────

    @property
    def changed(self) -> bool:
        return self.known and (self._fresh or bool(self._n_ticks) or bool(self._marks))

    def renew(self) -> None:
        """Let the next frame be everything: this picture takes the place of another."""
        self._fresh = True

    def whole(self) -> dict[str, Any]:
        """Everything, for a viewer that knows nothing."""
        return {
            "kind": "whole",
            "known": self.known,
            "config": self.config,
            **self._now(),
            "tasks": [task.row() for task in self.tasks.values()],
            "tables": [[task.id, task.table] for task in self.tasks.values() if task.table],
            "pages": _run_lengths(self.pages),
        }

    def frame(self) -> dict[str, Any]:
        """What changed since the last frame; after a snapshot event that is everything."""
        if self._fresh:
            self._fresh = False
            self._clear_changes()
            return self.whole()
        views = self.tasks
        steps: list[int] = []
        for id in self._stepped - self._changed:
            if view := views.get(id):
                steps += (id, view.computed, view.n_output)
        pages: list[int] = []
        for frame in self._pages_changed:
            pages += (frame, self.pages[frame])
        frame_of = {
            "kind": "frame",
            **self._now(),
            "ticks": self._n_ticks,
            "tasks": [views[id].row() for id in sorted(self._changed) if id in views],
            "steps": steps,
            "gone": self._gone,
            "pages": pages,
            "tables": [
                [id, keep, views[id].table[keep:]]
                for id, keep in self._tables_kept.items()
                if id in views
            ],
            "marks": self._marks,
            "flow": self._flow,
        }
        self._clear_changes()
        return frame_of

    def _now(self) -> dict[str, Any]:
        return {
            "tick": self.tick,
            "time": self.time,
            "running": self.n_running,
            "waiting": self.n_waiting,
            "counts": self.counts,
            "wait": self.wait if self.n_waiting else None,
            "groups": self.groups,
            "made": self.n_output,
            "ended": self.n_ended,
        }

    def _clear_changes(self) -> None:
        self._changed: set[int] = set()
        self._stepped: set[int] = set()
        self._gone: list[int] = []
        self._pages_changed: set[int] = set()
        self._tables_kept: dict[int, int] = {}  # task id → leading entries that are unchanged
        self._marks: list[list[Any]] = []
        self._n_ticks = 0
        # Since the last frame: tasks that ended and entered, positions prefilled and decoded.
        self._flow = {"ended": 0, "admitted": 0, "prefill": 0, "decode": 0, "preempted": 0}

    # ── the events ────────────────────────────────────────────────────────────────────────────────

    def _on_snapshot(
        self,
        time: float,
        config: dict[str, Any],
        tasks: Iterable[dict[str, Any]],
        indexed: Iterable[int],
        blocked: str | None,
    ) -> None:
        self._reset()
        self.known, self.config, self.time, self.wait = True, config, time, blocked
        self.pages = [FREE] * config["n_pages"]
        self._indexed = set(indexed)
        for of in tasks:
            view = TaskView(
                of["task"],
                of["request"],
                of["n_prompt"],
                of["max_tokens"],
                of["priority"],
                slot=of["slot"],
                computed=of["computed"],
                n_output=of["n_output"],
                n_cached=of["n_cached"],
                n_preempted=of["n_preempted"],
                arrived=of["arrived"],
                first_token=of["first_token"],
                table=list(of["frames"]),
            )
            self.tasks[view.id] = view
            self._restore_spans(view, of["admitted"])
            for frame in view.table:
                self.pages[frame] += 1
        self.n_running = sum(1 for view in self.tasks.values() if view.slot >= 0)
        self.n_waiting = len(self.tasks) - self.n_running
        for frame in self._indexed:
            if self.pages[frame] == FREE:
                self.pages[frame] = CACHED
        cached = self.pages.count(CACHED)
        free = self.pages.count(FREE)
        self.counts = (free, cached, len(self.pages) - free - cached)

    def _restore_spans(self, view: TaskView, admitted: float | None) -> None:
        """Of what happened before the snapshot only the outline is known."""
        if admitted is None:
            view.spans = [["queued", view.arrived, None]]
            return
        view.spans = [["queued", view.arrived, admitted], ["prefill", admitted, None]]
        if view.first_token is not None:
            view.spans[-1][2] = view.first_token
            view.spans.append(["decode", view.first_token, None])
        self._give_colour(view)
        view.state = "preempted" if view.slot < 0 else view.spans[-1][0]

    def _on_arrive(
        self,
        id: int,
        request: str,
        n_prompt: int,
        max_tokens: int,
        priority: int,
        time: float,
        choices: Iterable[int],
        *more: Any,
    ) -> None:
        for task in (id, *choices):
            view = TaskView(task, request, n_prompt, max_tokens, priority, arrived=time)
            view.spans = [["queued", time, None]]
            self.tasks[task] = view
            self._changed.add(task)
        self._mark("arrive", id, n_prompt)

    def _on_refuse(self, request: str, why: str) -> None:
        self._mark("refuse", -1, f"{request}: {why}")

    def _on_tick(
        self,
        time: float,
        n_running: int,
        n_waiting: int,
        free: int,
        cached: int,
        held: int,
        n_output: int,
        *more: Any,
    ) -> None:
        self.time, self.n_output = time, n_output
        self.n_running, self.n_waiting, self.counts = n_running, n_waiting, (free, cached, held)
        if not n_waiting:
            self.wait = None
        self._n_ticks += 1
        for span, end in self._unstamped:
            span[end] = time
        self._unstamped.clear()
        if not self._decoded:
            self.groups = []
        self._decoded = []

    def _on_wait(self, reason: str, head: int, n_waiting: int, *more: Any) -> None:
        self.wait = reason

    def _on_fork(self, id: int, of: int, n_shared: int) -> None:
        self._mark("fork", id, of)

    def _on_admit(self, id: int, slot: int, n_cached: int, *more: Any) -> None:
        view = self.tasks[id]
        view.slot = slot
        view.computed = view.seated_at = n_cached
        if view.colour < 0:
            self._give_colour(view)
            view.n_cached = min(n_cached, view.n_prompt)
        self._flow["admitted"] += 1
        self._enter(view, "prefill")
        self._mark("admit", id, n_cached)

    def _on_take(self, id: int, frames: list[int]) -> None:
        view = self.tasks[id]
        self._keep_table(view, len(view.table))
        view.table += frames
        for frame in frames:
            self._set_page(frame, 1)
            self._indexed.discard(frame)
        self._mark("take", id, frames[:8])

    def _on_share(self, id: int, frames: list[int]) -> None:
        view = self.tasks[id]
        self._keep_table(view, 0)
        view.table = list(frames)
        for frame in frames:
            self._set_page(frame, max(self.pages[frame], 0) + 1)
        self._mark("share", id, frames[:8])

    def _on_evict(self, frames: list[int]) -> None:
        for frame in frames:
            self._set_page(frame, FREE)
        self._indexed.difference_update(frames)
        self._mark("evict", -1, frames[:64])

    def _on_copy(self, id: int, source: int, target: int) -> None:
        self._mark("copy", id, [source, target])

    def _on_index(self, id: int, frames: list[int]) -> None:
        self._indexed.update(frames)

    def _on_forget(self, frames: list[int]) -> None:
        self._indexed.difference_update(frames)

    def _on_return(self, id: int, frames: list[int]) -> None:
        view = self.tasks[id]
        self._keep_table(view, 0)
        view.table = []
        for frame in frames:
            refs = self.pages[frame] - 1
            self._set_page(frame, refs or (CACHED if frame in self._indexed else FREE))
        self._mark("return", id, frames[:8])

    def _on_prefill(self, id: int, start: int, count: int) -> None:
        view = self.tasks[id]
        if start != view.seated_at:
            self._enter(view, "prefill")  # each further chunk is a piece of its own
        view.computed = start + count
        self._flow["prefill"] += count
        self._stepped.add(id)

    def _on_decode(self, ids: list[int]) -> None:
        self._decoded = ids
        self._flow["decode"] += len(ids)
        self._stepped.update(ids)
        for id in ids:
            view = self.tasks[id]
            view.computed += 1
            # It feeds back the token at its last position, so it is about to have one more.
            view.n_output = max(view.n_output, view.computed - view.n_prompt)
            if view.state != "decode":
                self._enter(view, "decode")

    def _on_groups(self, sizes: list[int]) -> None:
        at = 0
        self.groups = []
        for size in sizes:
            self.groups.append(self._decoded[at : at + size])
            at += size

    def _on_preempt(self, id: int, by: int) -> None:
        view = self.tasks[id]
        view.slot = -1
        view.computed = 0
        view.n_preempted += 1
        self._flow["preempted"] += 1
        self._enter(view, "preempted")
        self._mark("preempt", id, by)

    def _on_first_token(self, id: int, time: float) -> None:
        view = self.tasks[id]
        view.first_token = time
        view.n_output = max(view.n_output, 1)
        self._changed.add(id)

    def _on_end(self, id: int, reason: str, n_output: int, time: float, *more: Any) -> None:
        view = self.tasks[id]
        view.state, view.reason, view.n_output, view.slot = "ended", reason, n_output, -1
        view.spans[-1][2] = time
        self._colours[view.colour] -= 1
        self._flow["ended"] += 1
        self.n_ended += 1
        self._changed.add(id)
        self._mark("end", id, reason)
        self._ended.append(id)
        if len(self._ended) > KEEP_ENDED:
            gone = self._ended.popleft()
            del self.tasks[gone]
            self._gone.append(gone)

    # ── pieces ────────────────────────────────────────────────────────────────────────────────────

    def _enter(self, view: TaskView, state: State) -> None:
        if view.spans[-1][2] is None:
            self._unstamped.append((view.spans[-1], 2))
        if len(view.spans) >= KEEP_SPANS:
            del view.spans[1]  # the one next to it seems longer
        view.state = state
        view.spans.append([state, self.time, None])
        self._unstamped.append((view.spans[-1], 1))
        self._changed.add(view.id)

    def _give_colour(self, view: TaskView) -> None:
        view.colour = min(range(N_COLOURS), key=lambda colour: self._colours[colour])
        self._colours[view.colour] += 1

    def _set_page(self, frame: int, refs: int) -> None:
        self.pages[frame] = refs
        self._pages_changed.add(frame)

    def _keep_table(self, view: TaskView, n: int) -> None:
        self._tables_kept[view.id] = min(n, self._tables_kept.get(view.id, n))

    def _mark(self, kind: str, id: int, about: Any) -> None:
        if len(self._marks) < KEEP_MARKS:
            self._marks.append([self.tick, kind, id, about])


def _run_lengths(values: list[int]) -> list[int]:
    """[value, count, value, count, ...]: a large pool that is mostly free stays small."""
    runs: list[int] = []
    for value in values:
        if runs and runs[-2] == value:
            runs[-1] += 1
        else:
            runs += (value, 1)
    return runs
