"""Writes every decision of the scheduler into files from which a run can be replayed exactly.

A recording is JSON lines. The first line of each file is a header (version, configuration, the
table of kinds); every other line is one turn of the loop:

    [tick, base, n, [kind, value, ...], [kind, value, ...], ...]

`kind` is an index into the header's table. The first `n` events came before the tick and carry the
number of the tick before. Times are whole microseconds after `base`, which counts from the start of
the recording and is the time of the "tick" event before. A "decode" or "groups" event without
values repeats the one before it.

Nothing of what was said is in it, unless asked for. The scheduler's decisions depend on tokens only
through the prefix cache, which asks whether two full pages have the same content and the same pages
before them. So each full page is written as a keyed hash of its namespace and of all tokens up to
its end. The key is random and never leaves this process: whoever reads the file learns which
prefixes were equal, page by page, and cannot test a guess.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import secrets
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import astrai
from astrai.config import EngineConfig
from astrai.inference.events import KINDS
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Task

logger = logging.getLogger(__name__)

FORMAT = 1
# What the recorder adds to what the scheduler tells.
ADDED: dict[str, tuple[str, ...]] = {
    # Hashes of the full pages of a prompt; `whole`: it takes none of them from the prefix cache;
    # `structured`: it waits for a grammar, and each of its steps for the token before.
    "content": ("task", "pages", "whole", "structured"),
    "page": ("task", "pages"),  # hashes of pages that output tokens filled in this tick
    "text": ("task", "prompt", "output"),  # token ids at its end, if asked for
}
TIMES = frozenset({"time", "began", "cleaned", "refilled", "prefilled", "ended"})
REPEATS = frozenset({"decode", "groups"})
_FLUSH_BYTES = 1 << 16
_FLUSH_SECONDS = 1.0
_KEPT = 3  # earlier recordings


def record(config: EngineConfig, scheduler: Scheduler, about: Mapping[str, Any]) -> Recorder | None:
    """Attach a recorder, if the configuration names a file. Raises OSError, naming the file."""
    if config.record is None:
        return None
    recorder = Recorder(
        config.record,
        scheduler,
        about,
        max_bytes=config.record_mib << 20,
        max_files=config.record_files,
        prompts=config.record_prompts,
    )
    scheduler.events.attach(recorder)
    return recorder


def part_path(path: Path, part: int) -> Path:
    """The file of part `part`: run.jsonl, run.1.jsonl, run.2.jsonl …"""
    return path if part == 0 else path.with_name(f"{path.stem}.{part}{path.suffix}")


class _Known(NamedTuple):
    task: Task
    digest: bytes  # of everything up to the last full page
    border: int  # tokens that fill the next page


class _Code(NamedTuple):
    number: int
    times: tuple[int, ...]  # which of the values are times


class Recorder:
    """A reader of events that writes them to `path`, part after part.

    Lines reach the operating system once a second, at every 64 KiB, when the loop runs out of work
    and at `close`: a process that is killed loses the last second at most. A part that reaches
    `max_bytes` is followed by the next; of more than `max_files` parts the oldest is deleted. The
    three recordings before it at this path are kept, as run.old.jsonl (the last), run.old2.jsonl
    and run.old3.jsonl.

    A full disk, or whatever else goes wrong here, ends the recording, not the engine: `error` then
    says why, and so does one line of the log.

    Owns the files. Reads tasks of the scheduler, in the owner thread, and changes none.
    """

    def __init__(
        self,
        path: str | Path,
        scheduler: Scheduler,
        about: Mapping[str, Any],
        *,
        max_bytes: int = 64 << 20,
        max_files: int = 16,
        prompts: bool = False,
    ) -> None:
        self.path = Path(path)
        self.error: str | None = None
        self._scheduler = scheduler
        self._about = dict(about)
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._prompts = prompts
        self._key = secrets.token_bytes(32)
        self._size = scheduler.books.page_size
        self._known: dict[int, _Known] = {}
        self._due: dict[int, list[int]] = {}  # tick → tasks that may have filled a page by then
        kinds = {**KINDS, **ADDED}
        self._codes = {
            kind: _Code(index, tuple(i for i, name in enumerate(names) if name in TIMES))
            for index, (kind, names) in enumerate(kinds.items())
            if kind != "snapshot"
        }
        self._repeated: dict[str, Any] = {}
        self._start = self._base = scheduler.clock()
        self._tick = scheduler.n_tick  # the last one written
        self._n_before = 0
        self._events: list[list[Any]] = []
        self._lines: list[str] = []
        self._n_pending = 0  # characters in `_lines`
        self._flushed_at = time.monotonic()
        self._part = 0
        self._n_written = 0  # bytes in the present part
        _move_aside(self.path)
        self._file = self.path.open("wb", buffering=0)
        self._begin_part()
        self._flush()

    def __call__(self, tick: int, kind: str, values: tuple[Any, ...]) -> None:
        if self.error is None and (code := self._codes.get(kind)) is not None:
            try:
                self._take(code, tick, kind, values)
            except Exception as error:
                self._stop(error)

    def _take(self, code: _Code, tick: int, kind: str, values: tuple[Any, ...]) -> None:
        if tick == self._tick:
            self._n_before += 1
        if kind in REPEATS:
            if self._repeated.get(kind) == values:
                values = ()
            else:
                self._repeated[kind] = values
        event = [code.number, *values]
        for i in code.times:
            event[i + 1] = round((values[i] - self._base) * 1e6)
        self._events.append(event)
        if kind == "tick":
            self._end_tick(tick, values)
        elif kind == "arrive":
            self._arrive(values[0], values[6])
        elif kind == "end":
            self._end(values[0])

    def close(self) -> None:
        """Write what is there. The owner thread has ended, or will never call again."""
        if self.error is None:
            for known in self._known.values():
                self._add_text(known.task)
            if self._events:
                self._add_line(self._tick + 1)
            self._flush()
        self._file.close()

    # ── contents ──────────────────────────────────────────────────────────────────────────────────

    def _arrive(self, task_id: int, choices: list[int]) -> None:
        leader = self._scheduler.tasks[task_id]
        root = self._hash(b"", leader.namespace.encode())
        known, pages = self._advanced(_Known(leader, root, self._size))
        params = leader.params
        structured = params.structured is not None
        self._add("content", task_id, pages, params.reads_whole_prompt, structured)
        for choice in (task_id, *choices):
            task = self._scheduler.tasks[choice]
            self._known[choice] = known._replace(task=task)
            self._look_again(choice, self._scheduler.n_tick + 1)

    def _end(self, task_id: int) -> None:
        if (known := self._known.pop(task_id, None)) is not None:
            self._add_text(known.task)

    def _add_text(self, task: Task) -> None:
        if self._prompts:
            self._add("text", task.id, task.prompt, task.tokens[task.n_prompt :])

    def _filled(self, tick: int) -> None:
        """Tell which pages are full since this tick, as the index may be asked for them in it."""
        for task_id in self._due.pop(tick, ()):
            if (known := self._known.get(task_id)) is None:
                continue
            if len(known.task.tokens) >= known.border:
                self._known[task_id], pages = self._advanced(known)
                self._add("page", task_id, pages)
            self._look_again(task_id, tick)

    def _look_again(self, task_id: int, tick: int) -> None:
        """A task gains one token in a tick at most, so it fills its page no sooner than this."""
        known = self._known[task_id]
        missing = known.border - len(known.task.tokens)
        self._due.setdefault(tick + missing, []).append(task_id)

    def _advanced(self, known: _Known) -> tuple[_Known, list[int]]:
        """Past all full pages of the task, with their hashes."""
        task, digest, border = known
        pages = []
        while border <= len(task.tokens):
            digest = self._hash(digest, array("q", task.tokens[border - self._size : border]))
            pages.append(int.from_bytes(digest, "little"))
            border += self._size
        return _Known(task, digest, border), pages

    def _hash(self, before: bytes, content: bytes | array[int]) -> bytes:
        digest = hashlib.blake2b(before, digest_size=8, key=self._key)
        digest.update(content)
        return digest.digest()

    # ── lines and files ───────────────────────────────────────────────────────────────────────────

    def _add(self, kind: str, *values: Any) -> None:
        if self._scheduler.n_tick == self._tick:
            self._n_before += 1
        self._events.append([self._codes[kind].number, *values])

    def _end_tick(self, tick: int, values: tuple[Any, ...]) -> None:
        now, n_running, n_waiting = values[:3]
        self._filled(tick)
        self._add_line(tick)
        self._base = now
        idle = n_running == 0 and n_waiting == 0
        if (
            idle
            or self._n_pending >= _FLUSH_BYTES
            or time.monotonic() - self._flushed_at >= _FLUSH_SECONDS
        ):
            self._flush()

    def _add_line(self, tick: int) -> None:
        base = round((self._base - self._start) * 1e6)
        line = json.dumps([tick, base, self._n_before, *self._events], separators=(",", ":"))
        if self._n_written + self._n_pending + len(line) > self._max_bytes:
            self._flush()
            self._next_part()
            # Nothing in a part repeats what is in an earlier one.
            for event in self._events:
                for kind in REPEATS & self._repeated.keys():
                    if event == [self._codes[kind].number]:
                        event += self._repeated[kind]
            line = json.dumps([tick, base, self._n_before, *self._events], separators=(",", ":"))
        self._lines.append(line)
        self._n_pending += len(line) + 1
        self._tick, self._n_before = tick, 0
        self._events = []

    def _begin_part(self) -> None:
        scheduler = self._scheduler
        header = {
            "astrai_recording": FORMAT,
            "version": astrai.__version__,
            "part": self._part,
            "after_tick": self._tick,
            "written": round(time.time(), 3),
            "scheduler": asdict(scheduler.config),
            "n_pages": scheduler.books.pool.n_pages,
            "page_size": self._size,
            "prefix_cache": scheduler.books.prefix_cache,
            **self._about,
            "kinds": {**KINDS, **ADDED},
        }
        line = json.dumps(header, separators=(",", ":"))
        self._lines.append(line)
        self._n_pending += len(line) + 1

    def _next_part(self) -> None:
        if self.error is not None:
            return
        self._part += 1
        self._n_written = 0
        try:
            self._file.close()
            self._file = part_path(self.path, self._part).open("wb", buffering=0)
            if self._part >= self._max_files:
                part_path(self.path, self._part - self._max_files).unlink(missing_ok=True)
        except OSError as error:
            self._stop(error)
            return
        self._begin_part()

    def _flush(self) -> None:
        """Hand the lines to the operating system."""
        self._flushed_at = time.monotonic()
        if self.error is not None or not self._lines:
            return
        data = ("\n".join(self._lines) + "\n").encode()
        self._lines, self._n_pending = [], 0
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._stop(error)
            return
        self._n_written += len(data)

    def _stop(self, error: Exception) -> None:
        why = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        self.error = f"recording to {self.path} ended at tick {self._tick}: {why}"
        logger.warning(self.error)
        self._scheduler.events.detach(self)
        self._known.clear()
        self._due.clear()


def _move_aside(path: Path) -> None:
    """Keep the last recordings: what led to a crash must outlive the restarts."""
    names = [path] + [
        path.with_name(f"{path.stem}.old{n}{path.suffix}") for n in ("", *range(2, _KEPT + 1))
    ]
    for part in _parts(names[-1]):
        part.unlink()
    for older, newer in itertools.pairwise(reversed(names)):
        for part in _parts(newer):
            suffix = part.name.removeprefix(newer.stem)
            os.replace(part, part.with_name(f"{older.stem}{suffix}"))


def _parts(path: Path) -> list[Path]:
    """The files of the recording at `path`, in order; the first ones may be gone."""
    found = []
    for file in path.parent.iterdir():
        number = file.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
        if file.name == path.name:
            found.append((0, file))
        elif number.isdecimal() and file == part_path(path, int(number)):
            found.append((int(number), file))
    return [file for _, file in sorted(found)]
