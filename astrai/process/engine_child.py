"""The engine's process: a loop without HTTP, that talks to the server over its standard streams.

It ends when the server closes its standard input, and so also when the server dies.
"""

from __future__ import annotations

import copy
import importlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from astrai.config import EngineConfig
from astrai.front.intake import stop_check
from astrai.inference.engine import Engine, Health, Message
from astrai.inference.events import EventLog
from astrai.inference.task import SEEN, FinishReason, TokenLogprob, Update
from astrai.observe.logs import LogSettings, configure
from astrai.process.link import Assembled, Front
from astrai.process.pipes import Sender, read, write

EXIT_LOOP_FAILED = 70
_STOP_SECONDS = 5.0  # a tick may take so long to end; the process does not wait for more


class Start(NamedTuple):
    """To the engine: load. `builder` is "module:function" of an `assemble`."""

    builder: str
    config: EngineConfig
    logs: LogSettings


class Watch(NamedTuple):
    """To the engine: send events from now on, or no more."""

    events: bool


class Snapshot(NamedTuple):
    """To the engine: have a "snapshot" event emitted."""


class Stop(NamedTuple):
    """To the engine: end after the present tick."""


class Ready(NamedTuple):
    """From the engine: the loop runs."""

    front: Front


class Refused(NamedTuple):
    """From the engine: loading raised this."""

    error: Exception


# An Update as plain data: task id, token ids, logprobs, and when it is admitted, has begun and has
# ended the values of task.SEEN.
Moved = tuple[int, list[int], list[TokenLogprob], FinishReason | None, tuple[Any, ...] | None]


class Moves(NamedTuple):
    """From the engine: what a tick says of its tasks."""

    moved: list[Moved]


class Emitted(NamedTuple):
    """From the engine: events, each (tick, kind, values)."""

    events: list[tuple[int, str, tuple[Any, ...]]]


class Status(NamedTuple):
    """From the engine, with every write and at least about ten times a second."""

    health: Health


class Failed(NamedTuple):
    """From the engine: the loop ended by itself, and the process ends."""

    why: str


def main() -> None:
    """Run in a fresh interpreter: standard input is for messages in, standard output for those
    out."""
    # A signal to the whole group is for the server, which tells this process when to end.
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    inward = sys.stdin.buffer
    outward: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the messages
    messages = read(inward)
    start = next(messages, None)
    if start is None:
        return
    configure(*start.logs)
    child = Child(outward)
    try:
        child.load(start)
    except Exception as error:
        write(outward, [Refused(_plain(error))])
        return
    for message in messages:
        if isinstance(message, Stop):
            break
        child.read(message)
    child.stop()


def _plain(error: Exception) -> Exception:
    """`error`, or one of a built-in type that says the same, that another process can read."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    for kind in (FileNotFoundError, OSError, MemoryError, ValueError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


class Child:
    """Owns the engine and the stream to the server."""

    def __init__(self, outward: BinaryIO) -> None:
        self._outward = outward
        self._sender = Sender(outward, self._extra)
        self._events: deque[tuple[int, str, tuple[Any, ...]]] = deque()
        self._parts: Assembled

    def load(self, start: Start) -> None:
        module, _, name = start.builder.partition(":")
        build: Callable[..., Assembled] = getattr(importlib.import_module(module), name)
        self._parts = build(start.config, self._deliver)
        self._engine.start()
        self._sender.send(Ready(self._parts.front))
        self._sender.start()

    @property
    def _engine(self) -> Engine:
        return self._parts.engine

    @property
    def _log(self) -> EventLog:
        return self._parts.engine.scheduler.events

    def read(self, message: Message | Watch | Snapshot) -> None:
        if isinstance(message, Message):
            tokenizer = self._parts.front.tokenizer
            for leader in message.add:
                for task in (leader, *leader.siblings):
                    task.stop_check = stop_check(tokenizer, task.params)
            self._engine.post(message)
        elif isinstance(message, Snapshot):
            self._log.request_snapshot()
        elif message.events:
            self._log.detach(self._note)  # may be said twice
            self._log.attach(self._note)
        else:
            self._log.detach(self._note)

    def stop(self) -> None:
        """End the loop and write what it said last; never hang on a tick that does not end."""
        hard = threading.Timer(2 * _STOP_SECONDS, os._exit, (1,))
        hard.daemon = True
        hard.start()
        self._engine.stop(_STOP_SECONDS)
        if self._parts.recorder is not None:
            self._parts.recorder.close()
        self._sender.close(_STOP_SECONDS)

    def _note(self, tick: int, kind: str, values: tuple[Any, ...]) -> None:
        self._events.append((tick, kind, values))

    def _deliver(self, updates: list[Update]) -> None:
        # Of a loop that fails the server tells its requests, and may start some of them again.
        if self._engine.failure is None:
            self._sender.send(Moves([_moved(update) for update in updates]))

    def _extra(self) -> list[Any]:
        failure = self._engine.failure
        extra: list[Any] = []
        if self._events:
            extra.append(Emitted([self._events.popleft() for _ in range(len(self._events))]))
        extra.append(Status(self._engine.health()))
        if failure is not None:
            write(self._outward, [*extra, Failed(failure)])
            os._exit(EXIT_LOOP_FAILED)
        return extra


def _moved(update: Update) -> Moved:
    task, token_ids, logprobs, reason = update
    seen = None
    if reason is not None or task.n_output <= len(token_ids):
        seen = tuple(copy.copy(getattr(task, name)) for name in SEEN)  # the loop goes on
    return task.id, token_ids, logprobs, reason, seen
