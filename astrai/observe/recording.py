"""Reads recordings: the header, and the events as the scheduler told them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from astrai.config import SchedulerConfig
from astrai.observe.recorder import ADDED, FORMAT, REPEATS, TIMES, part_path


class Event(NamedTuple):
    tick: int
    kind: str
    values: tuple[Any, ...]


class Step(NamedTuple):
    """One turn of the loop: what came before it, and what it decided."""

    tick: int
    before: list[Event]  # messages, launches and reads since the tick before
    events: list[Event]  # of the tick; the last is "tick", or else the engine ended in it


@dataclass(frozen=True, slots=True)
class Header:
    """What a recording says of itself."""

    path: Path
    version: str  # of the package that wrote it
    part: int
    after_tick: int
    written: float  # seconds since the epoch
    scheduler: SchedulerConfig
    n_pages: int
    page_size: int
    prefix_cache: bool
    depth: int  # launches that may be unread when the next is planned
    about: dict[str, Any]  # model, device and the like
    kinds: dict[str, tuple[str, ...]]

    @property
    def whole(self) -> bool:
        """It begins where the engine began, so that it can be replayed."""
        return self.part == 0 and self.after_tick == 0


class Recording:
    """A recording on disk, read from the part at `path` to the last.

    Raises ValueError, naming the file, if it is not a recording or of a newer format. Owns nothing:
    each iteration reads the files again, line by line. Lines after a torn one are not there: a
    process that is killed may leave half a line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open(encoding="utf-8") as file:
            self.header = _header(self.path, file.readline())

    def steps(self) -> Iterator[Step]:
        """Turns of the loop, in order, with times in seconds since the recording began."""
        name = self.path.name
        first = self.path
        if self.header.part:
            first = self.path.with_name(name.replace(f".{self.header.part}.", ".", 1))
        part, path = self.header.part, self.path
        while path.exists():
            yield from _steps_of(path)
            part += 1
            path = part_path(first, part)

    def require_whole(self, what: str) -> None:
        """Raise ValueError if the recording does not begin where its engine began."""
        header = self.header
        if not header.whole:
            raise ValueError(
                f"{self.path} is part {header.part} of a recording and begins after tick "
                f"{header.after_tick}: {what} needs it from its first part on"
            )

    def _snapshot(self) -> Event:
        header, scheduler = self.header, self.header.scheduler
        config = {
            "n_pages": header.n_pages,
            "page_size": header.page_size,
            "max_slots": scheduler.max_slots,
            "prefill_budget": scheduler.prefill_budget,
            "group_decode": scheduler.group_decode,
            "batching": scheduler.batching,
        }
        return Event(header.after_tick, "snapshot", (0.0, config, [], [], None))

    def events(self) -> Iterator[Event]:
        """What the readers of a running engine see, without what the recorder adds.

        The first is a snapshot: of the empty engine, if the recording is whole.
        """
        yield self._snapshot()
        for step in self.steps():
            for event in (*step.before, *step.events):
                if event.kind not in ADDED:
                    yield event


def _steps_of(path: Path) -> Iterator[Step]:
    with path.open(encoding="utf-8") as file:
        header = _header(path, file.readline())
        kinds = list(header.kinds.items())
        times = [tuple(i for i, name in enumerate(names) if name in TIMES) for _, names in kinds]
        repeated: dict[str, tuple[Any, ...]] = {}
        for line in file:
            if not line.endswith("\n"):
                return
            tick, base, n_before, *coded = json.loads(line)
            events = []
            for i, (code, *values) in enumerate(coded):
                kind = kinds[code][0]
                for place in times[code]:
                    values[place] = (base + values[place]) / 1e6
                told = tuple(values)
                if kind in REPEATS:
                    told = repeated[kind] = told or repeated[kind]
                events.append(Event(tick - (i < n_before), kind, told))
            yield Step(tick, events[:n_before], events[n_before:])


def _header(path: Path, line: str) -> Header:
    try:
        fields = json.loads(line)
        form = fields.pop("astrai_recording")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} is not a recording: its first line is no header") from None
    if form != FORMAT:
        raise ValueError(f"{path} is a recording of format {form}, expected {FORMAT}")
    return Header(
        path=path,
        version=fields.pop("version"),
        part=fields.pop("part"),
        after_tick=fields.pop("after_tick"),
        written=fields.pop("written"),
        scheduler=SchedulerConfig(**fields.pop("scheduler")),
        n_pages=fields.pop("n_pages"),
        page_size=fields.pop("page_size"),
        prefix_cache=fields.pop("prefix_cache"),
        depth=fields.pop("depth"),
        kinds={kind: tuple(names) for kind, names in fields.pop("kinds").items()},
        about=fields,
    )
