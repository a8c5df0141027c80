"""What the film tells, as plain data derived from the events of a run. No Manim here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

Events = Iterable[tuple[int, str, tuple[Any, ...]]]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def label(number: int) -> str:
    """A, B, … Z, A1, B1, …: the name of the request that arrived as number `number`."""
    lap, letter = divmod(number, len(_LETTERS))
    return _LETTERS[letter] + (str(lap) if lap else "")


@dataclass(slots=True)
class Moment:
    """One tick as a picture. Tasks are ids; `slots` is after Refill, so with the newcomers."""

    tick: int
    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)  # at this tick's Cleanup
    prefill: dict[int, int] = field(default_factory=dict)  # task → positions computed
    decode: list[int] = field(default_factory=list)
    together: list[list[int]] = field(default_factory=list)  # decode tasks of one dense matmul
    slots: dict[int, int] = field(default_factory=dict)  # task → slot
    waiting: list[int] = field(default_factory=list)
    reason: str = ""  # why the head of the queue waits

    @property
    def eventful(self) -> bool:
        """Somebody came, left or was prefilled: worth looking at for longer."""
        return bool(self.admitted or self.ended or self.preempted or self.prefill)


def occupied_mask(slots: Iterable[int]) -> int:
    mask = 0
    for slot in slots:
        mask |= 1 << slot
    return mask


def moments(events: Events) -> list[Moment]:
    """The ticks of a run in which something ran or ended, in order."""
    told: list[Moment] = []
    slots: dict[int, int] = {}
    waiting: list[int] = []
    reason = ""
    now = Moment(-1)
    for tick, kind, values in events:
        if tick != now.tick:
            now = Moment(tick)
        if kind == "arrive":
            waiting.append(values[0])
        elif kind == "admit":
            task, slot = values[:2]
            slots[task] = slot
            now.admitted.append(task)
            if task in waiting:
                waiting.remove(task)
        elif kind == "wait":
            reason = values[0]
        elif kind == "prefill":
            now.prefill[values[0]] = values[2]
        elif kind == "decode":
            now.decode = list(values[0])
        elif kind == "groups":
            now.together = _together(now.decode, values[0])
        elif kind == "preempt":
            slots.pop(values[0], None)
            waiting.insert(0, values[0])
            now.preempted.append(values[0])
        elif kind == "end":
            slots.pop(values[0], None)
            now.ended.append(values[0])
            if values[0] in waiting:
                waiting.remove(values[0])
        elif kind == "tick":
            now.slots, now.waiting = dict(slots), list(waiting)
            now.reason = reason if waiting else ""
            if now.eventful or now.decode:
                told.append(now)
    return told


def _together(tasks: list[int], sizes: list[int]) -> list[list[int]]:
    """The decode event lists its tasks group by group."""
    ends = list(accumulate(sizes))
    return [tasks[end - size : end] for size, end in zip(sizes, ends)]


class PoolState(NamedTuple):
    """The page frames after a step."""

    refs: tuple[int, ...]
    cached: frozenset[int]

    @property
    def free_mask(self) -> int:
        free = (i for i, n in enumerate(self.refs) if n == 0 and i not in self.cached)
        return occupied_mask(free)


class Step(NamedTuple):
    """Something that happened to the pages of one of the actors."""

    kind: str  # "alloc", "grow", "share", "end"
    tick: int
    actor: int  # 0, 1, 2: A, B, C
    frames: list[int]  # taken, shared or returned by this step
    table: list[int]  # of the actor, after the step (before it for "end")
    positions: int  # prompt tokens for "alloc" and "share", KV positions otherwise
    pool: PoolState


class CacheStory(NamedTuple):
    """The lives of up to three requests' pages: A, who grows; B beside it; C, who shares with A."""

    steps: list[Step]
    n_pages: int
    actors: list[int]  # task ids of A, B, C


class _Pages:
    """Page tables, refs and cached frames, replayed from events. Owns its copy of them."""

    def __init__(self, n_pages: int) -> None:
        self.refs = [0] * n_pages
        self.cached: set[int] = set()
        self.indexed: set[int] = set()
        self.tables: dict[int, list[int]] = {}

    def read(self, kind: str, values: tuple[Any, ...]) -> None:
        if kind == "take":
            for frame in values[1]:
                self.refs[frame] = 1
            self.tables.setdefault(values[0], []).extend(values[1])
        elif kind == "share":
            for frame in values[1]:
                self.refs[frame] += 1
                self.cached.discard(frame)
            self.tables[values[0]] = list(values[1])
        elif kind == "index":
            self.indexed.update(values[1])
        elif kind in ("evict", "forget"):
            self.cached.difference_update(values[0])
            self.indexed.difference_update(values[0])
        elif kind == "return":
            for frame in values[1]:
                self.refs[frame] -= 1
                if self.refs[frame] == 0 and frame in self.indexed:
                    self.cached.add(frame)
            self.tables.pop(values[0], None)

    def state(self) -> PoolState:
        return PoolState(tuple(self.refs), frozenset(self.cached))


def cache_story(events: Events, n_pages: int) -> CacheStory:
    """The steps of A, B and C among the events of a run.

    Raises ValueError if nobody in the run both grew in decode and was shared with: then there is
    no such story to tell.
    """
    events = list(events)
    actors = _cast(events, n_pages)
    steps: list[Step] = []
    pages = _Pages(n_pages)
    prompts: dict[int, int] = {}
    computed: dict[int, int] = {}
    shared: dict[int, list[int]] = {}
    done: set[int] = set()
    for tick, kind, values in events:
        before = pages.tables.get(values[0], []) if kind == "return" else []
        table = list(before)
        pages.read(kind, values)
        if kind == "arrive":
            prompts[values[0]] = values[2]
        elif kind == "prefill":
            computed[values[0]] = values[1] + values[2]
        elif kind == "decode":
            for task in values[0]:
                computed[task] = computed.get(task, 0) + 1
        task = values[0] if kind in ("take", "share", "return") else None
        if task not in actors or task in done:
            continue
        who = actors.index(task)
        if kind == "share":
            shared[task] = list(values[1])
            continue
        n, frames = prompts[task], list(values[1])
        if kind == "take":
            table = list(pages.tables[task])
            name = "grow" if task in computed else "share" if task in shared else "alloc"
            if name == "grow":
                n = computed[task] + 1
            elif name == "share":
                frames = shared[task]
        else:
            name, n = "end", computed.get(task, n)
            done.add(task)
        steps.append(Step(name, tick, who, frames, table, n, pages.state()))
    return CacheStory(steps, n_pages, actors)


def _cast(events: list[tuple[int, str, tuple[Any, ...]]], n_pages: int) -> list[int]:
    """Task ids of A (grows, is shared with), B (another of A's time), C (shares A's pages)."""
    pages = _Pages(n_pages)
    preempted = {values[0] for _, kind, values in events if kind == "preempt"}
    decoded: set[int] = set()
    grew: set[int] = set()
    alive_with: dict[int, list[int]] = {}
    for _, kind, values in events:
        if kind == "share":
            owners = [t for t, table in pages.tables.items() if values[1][0] in table]
            for owner in owners:
                others = [t for t in alive_with.get(owner, []) if t != values[0]]
                cast = [owner, *others[:1], values[0]]
                if owner in grew and others and preempted.isdisjoint(cast):
                    return cast
        if kind == "take":
            if values[0] in decoded:
                grew.add(values[0])
            for owner, table in pages.tables.items():
                if table and owner != values[0]:
                    alive_with.setdefault(owner, []).append(values[0])
        if kind == "decode":
            decoded.update(values[0])
        pages.read(kind, values)
    raise ValueError(
        "no request of this run grew by a page in decode and then shared its prefix with a later "
        "one while a third was there (and none of them was preempted): choose --scene batching, "
        "record another run, or give no recording"
    )
