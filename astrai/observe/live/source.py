"""Where a picture comes from: the events of a running engine, or a recording played back."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from astrai.observe.live.picture import Picture

Event = tuple[int, str, tuple[Any, ...]]

MAX_PENDING = 20_000  # events between two frames past which the picture is asked for anew
N_CHECKPOINTS = 64


class EventSource(Protocol):
    """What the engine's event log offers a reader that comes late."""

    def attach(self, reader: Callable[[int, str, tuple[Any, ...]], None]) -> None: ...

    def detach(self, reader: Callable[[int, str, tuple[Any, ...]], None]) -> None: ...

    def request_snapshot(self) -> None: ...


class LiveSource:
    """Reads a running engine while it is open; closed, the engine has one reader less.

    Owns the events that came since the last `pull`. In the engine's thread an event costs one
    append; when nobody pulls, events are dropped and the picture begins again from a snapshot.
    """

    def __init__(self, events: Callable[[], EventSource]) -> None:
        self._events = events
        self._pending: deque[Event] = deque()
        self._lost = False
        self._picture = Picture()

    def open(self) -> None:
        self._begin_again()
        self._events().attach(self._read)
        self._events().request_snapshot()

    def close(self) -> None:
        self._events().detach(self._read)
        self._begin_again()

    def pull(self) -> Picture:
        """The picture of now."""
        picture, pending = self._picture, self._pending
        for _ in range(len(pending)):
            tick, kind, values = pending.popleft()
            if tick < picture.tick and kind != "snapshot":
                self._lost = True  # an engine that was started again
                break
            try:
                picture(tick, kind, values)
            except LookupError:  # a task or page that this picture does not know: likewise
                self._lost = True
                break
        if self._lost:
            self._begin_again()
            self._events().request_snapshot()
        return self._picture

    def player(self) -> None:
        """A running engine is not played: it runs."""

    def _read(self, tick: int, kind: str, values: tuple[Any, ...]) -> None:
        if len(self._pending) < MAX_PENDING:
            self._pending.append((tick, kind, values))
        else:
            self._lost = True

    def _begin_again(self) -> None:
        self._pending.clear()
        self._lost = False
        self._picture = Picture()


class Playback:
    """Plays recorded events at a chosen number of ticks per second, from any tick.

    `events` begin with a "snapshot" event. Owns the events, the position among them, and pictures
    at a bounded number of ticks, so that going back applies a small part of them again.
    """

    def __init__(
        self, events: Iterable[Event], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._events = list(events)
        if not self._events or self._events[0][1] != "snapshot":
            raise ValueError(
                f"{len(self._events)} events, expected at least one, the first a snapshot"
            )
        self._clock = clock
        # Index of the event after each "tick" event, and the tick it ended.
        self._borders = [(i + 1, e[0]) for i, e in enumerate(self._events) if e[1] == "tick"]
        if not self._borders:
            raise ValueError(f"{len(self._events)} events without a tick: there is nothing to play")
        self._every = max(1, len(self._borders) // N_CHECKPOINTS)
        self._checkpoints: dict[int, Picture] = {}
        self._picture = Picture()
        self._applied = 0
        self._at = 0.0  # ticks from the first, a fraction while playing
        self._was = clock()
        self.playing = True
        self.speed = 20.0

    def open(self) -> None:
        self._was = self._clock()

    def close(self) -> None:
        pass

    def control(
        self,
        playing: bool | None = None,
        speed: float | None = None,
        at: int | None = None,
        step: int | None = None,
    ) -> None:
        """Any of: play or pause, ticks per second, go to the tick with index `at`, or `step` ticks
        on or back."""
        if speed is not None and not 0.1 <= speed <= 100_000:
            raise ValueError(f"{speed = }, expected 0.1 to 100000 ticks per second")
        self.pull()
        if playing is not None:
            self.playing = playing
            if playing and self._at >= self._last:
                self._at = 0.0
        if speed is not None:
            self.speed = speed
        if at is not None:
            self._at = float(at)
        if step is not None:
            self.playing = False
            self._at = float(int(self._at) + step)
        self._at = min(max(self._at, 0.0), float(self._last))

    def pull(self) -> Picture:
        """The picture at the present position."""
        now = self._clock()
        if self.playing:
            self._at = min(self._at + (now - self._was) * self.speed, float(self._last))
            self.playing = self._at < self._last
        self._was = now
        self._go(int(self._at))
        return self._picture

    def player(self) -> dict[str, Any]:
        """What the page's slider shows."""
        at = int(self._at)
        return {
            "at": at,
            "last": self._last,
            "tick": self._borders[at][1],
            "playing": self.playing,
            "speed": self.speed,
        }

    @property
    def _last(self) -> int:
        return len(self._borders) - 1

    def _go(self, at: int) -> None:
        wanted = self._borders[at][0]
        if wanted < self._applied:
            before = max((c for c in self._checkpoints if c <= at), default=None)
            # A copy, so that the checkpoint stays what it is.
            self._picture = (
                Picture() if before is None else copy.deepcopy(self._checkpoints[before])
            )
            self._applied = 0 if before is None else self._borders[before][0]
            self._picture.renew()
        ticks = 0 if self._applied == 0 else self._index_of(self._applied)
        for i in range(self._applied, wanted):
            event = self._events[i]
            self._picture(*event)
            if event[1] == "tick":
                if ticks % self._every == 0 and ticks not in self._checkpoints:
                    self._checkpoints[ticks] = copy.deepcopy(self._picture)
                ticks += 1
        self._applied = wanted

    def _index_of(self, applied: int) -> int:
        """How many ticks lie before event index `applied`."""
        low, high = 0, len(self._borders)
        while low < high:
            middle = (low + high) // 2
            if self._borders[middle][0] <= applied:
                low = middle + 1
            else:
                high = middle
        return low
