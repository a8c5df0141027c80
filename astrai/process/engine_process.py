"""The engine in a process of its own, seen from the server: started, watched, started again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from astrai.config import EngineConfig
from astrai.inference.engine import Health, Message
from astrai.inference.events import EventLog, Reader
from astrai.inference.task import SEEN, Task, Update
from astrai.observe.logs import log_settings
from astrai.process.engine_child import (
    Emitted,
    Failed,
    Moved,
    Moves,
    Ready,
    Refused,
    Snapshot,
    Start,
    Status,
    Stop,
    Watch,
)
from astrai.process.link import Deliver, Front
from astrai.process.pipes import Sender, read

logger = logging.getLogger(__name__)

_PROGRAM = "from astrai.process.engine_child import main; main()"
_STOP_SECONDS = 15.0
_SILENT_SECONDS = 5.0  # a living child speaks ten times a second
# An engine that lives less than this dies quickly; so many quick deaths in a row, and it is over.
QUICK_SECONDS = 30.0
MAX_QUICK_DEATHS = 5
# A request that ran, or may have, but had said nothing when so many engines died may be why.
MAX_TRIES = 2


class ProcessLink:
    """A loop in a child process, and its supervisor.

    If the child dies, requests that have begun to answer end with an error at once. The others
    are kept, and sent again to the next child. Tasks here mirror those of the loop: they have the
    tokens, and what task.SEEN names.

    Owns the child, the threads that talk to it, and the open tasks.
    """

    def __init__(
        self, config: EngineConfig, builder: str = "astrai.runtime.assemble:assemble"
    ) -> None:
        """Start the child, which begins to load; `connect` waits for it."""
        self.events = RemoteEvents(self._send)
        self._start = Start(builder, config, log_settings())
        self._silence = config.stall_seconds  # a child that says nothing for so long is killed
        self._deliver: Deliver = _nobody
        self._lock = threading.Lock()
        self._tasks: dict[int, Task] = {}  # every choice that has not ended
        self._leaders: dict[int, Task] = {}  # the first choices of requests that have not begun
        self._tries: dict[int, int] = {}  # leader's id → engines that died while it ran
        self._front: Front | None = None
        self._refused: Exception | None = None
        self._known = threading.Event()  # the first child is ready, or will not be
        self._connected = False
        self._stopping = threading.Event()
        self._ended: str | None = None
        self._failure: str | None = None  # why the last child ended, while there is no next one
        self._health = Health(False, "the engine is starting", {})
        self._heard_at = time.monotonic()
        self._spawn()
        self._supervisor = threading.Thread(target=self._run, name="astrai-link", daemon=True)

    # ── any thread ──────────────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        """Of the present child."""
        return self._child.pid

    @property
    def ended(self) -> str | None:
        return self._ended

    def connect(self, deliver: Deliver) -> Front:
        self._deliver = deliver
        self._supervisor.start()
        self._known.wait()
        if self._refused is not None:
            raise self._refused
        if self._front is None:
            raise RuntimeError(self._ended)
        return self._front

    def start(self) -> None:
        """The child's loop runs as soon as it is loaded."""

    def stop(self) -> None:
        with self._lock:  # the child is the last one from here on
            self._stopping.set()
        self._sender.send(Stop())
        self._sender.close(1.0)
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
        if self._supervisor.is_alive():
            self._supervisor.join(_STOP_SECONDS)

    def post(self, message: Message) -> None:
        with self._lock:
            for leader in message.add:
                self._leaders[leader.id] = leader
                self._tasks.update((task.id, task) for task in (leader, *leader.siblings))
            for task_id in message.abort:
                self._leaders.pop(task_id, None)  # not to be sent again
            if self._connected:
                self._sender.send(message)
                return
            # Tasks are kept for the next child. Who leaves is told here.
            told = [self._forget(i, "abort", None) for i in message.abort if i in self._tasks]
            if self._ended is not None:
                told += [self._forget(i, "error", self._ended) for i in list(self._tasks)]
        self._deliver(told)

    def health(self) -> Health:
        silent = time.monotonic() - self._heard_at
        health = self._health
        if self._ended is not None:
            return Health(False, self._ended, health.numbers)
        if self._failure is not None:
            return Health(False, f"{self._failure}; it is being started again", health.numbers)
        if silent > _SILENT_SECONDS:
            numbers = {**health.numbers, "seconds_silent": round(silent, 3)}
            return Health(False, f"the engine process is silent for {silent:.1f} s", numbers)
        return health

    # ── the supervisor's thread ─────────────────────────────────────────────────────────────────

    def _send(self, message: Any) -> None:
        if self._connected:
            self._sender.send(message)

    def _spawn(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self._heard_at = self._checked_at = time.monotonic()
        self._sender = Sender(self._pipe("stdin"), self._check_silence)
        self._sender.send(self._start)
        self._sender.start()

    def _pipe(self, name: str) -> Any:
        return getattr(self._child, name)

    def _check_silence(self) -> list[Any]:
        """A child whose heart stopped would keep everybody waiting. While it loads it may."""
        now = time.monotonic()
        if now - self._checked_at > 1.0:  # this process was stopped itself: it heard nobody
            self._heard_at = now
        self._checked_at = now
        silent = now - self._heard_at
        if self._connected and silent > self._silence and self._child.poll() is None:
            logger.error("the engine process said nothing for %.1f s: it is killed", silent)
            self._child.kill()
        return []

    def _run(self) -> None:
        try:
            self._supervise()
        except Exception as error:  # nobody would be told anything any more
            logger.exception("the supervision of the engine process failed")
            self._child.kill()
            self._end(f"the supervision of the engine process failed: {error}")

    def _supervise(self) -> None:
        quick_deaths = 0
        while True:
            started = time.monotonic()
            why = self._listen()
            if self._stopping.is_set() or self._front is None:
                self._end(why if self._front is None else "the engine was stopped")
                return
            quick = time.monotonic() - started < QUICK_SECONDS
            quick_deaths = quick_deaths + 1 if quick else 1
            if quick_deaths >= MAX_QUICK_DEATHS:
                self._end(f"{why}, for the {quick_deaths}th time in a row: given up")
                return
            logger.error("%s; it is started again", why)
            self._bury(why)
            self._stopping.wait(0.0 if quick_deaths == 1 else 0.25 * 2**quick_deaths)
            with self._lock:
                stopped = self._stopping.is_set()
                if not stopped:
                    self._spawn()
            if stopped:
                self._end("the engine was stopped")
                return

    def _listen(self) -> str:
        """Take what the child says until it ends; why it ended."""
        failure = None
        for message in read(self._pipe("stdout")):
            self._heard_at = time.monotonic()
            if isinstance(message, Moves):
                self._move(message.moved)
            elif isinstance(message, Status):
                self._health = message.health
            elif isinstance(message, Emitted):
                self.events.replay(message.events)
            elif isinstance(message, Ready):
                self._connect(message.front)
            elif isinstance(message, Refused):
                self._refused = message.error
                failure = f"the engine could not be loaded: {message.error}"
            elif isinstance(message, Failed):
                failure = f"the engine loop ended: {message.why}"
        with self._lock:
            self._connected = False
        self._sender.close(1.0)
        code = self._child.wait()
        for name in ("stdin", "stdout"):
            try:
                self._pipe(name).close()
            except OSError:  # what was not written any more
                continue
        return failure or f"the engine process ended with {_exit_name(code)}"

    def _connect(self, front: Front) -> None:
        with self._lock:
            self._connected = True
            self._failure = None
            if self.events:  # before the tasks, so that readers hear of their arrival
                self._sender.send(Watch(True))
                self._sender.send(Snapshot())  # what readers knew of the last child is void
            if self._leaders:
                self._sender.send(Message(add=list(self._leaders.values())))
        self._front = front
        self._known.set()

    def _move(self, moved: list[Moved]) -> None:
        updates = []
        for task_id, token_ids, logprobs, reason, seen in moved:
            task = self._tasks.get(task_id)
            if task is None:
                continue
            if seen is not None:
                for name, value in zip(SEEN, seen, strict=True):
                    setattr(task, name, value)
            if token_ids:
                task.tokens += token_ids
                self._leaders.pop(task_id, None)
            if reason is not None:
                task.finish_reason = reason
                with self._lock:
                    self._tasks.pop(task_id)
                    self._leaders.pop(task_id, None)
                    self._tries.pop(task_id, None)
            updates.append(Update(task, token_ids, logprobs, reason))
        self._deliver(updates)

    def _bury(self, why: str) -> None:
        """Who had begun is told; who had not is kept for the next child, unless he may be why."""
        told: list[Update] = []
        with self._lock:
            self._failure = why
            kept: set[int] = set()
            # What the child did last it may not have said: the first in the queue ran, perhaps.
            slots = (self._front and self._front.config.max_slots) or 1
            for i, leader in enumerate(list(self._leaders.values())):
                ran = leader.admitted_at is not None or i < slots
                tries = self._tries.get(leader.id, 0) + ran
                if tries < MAX_TRIES:
                    self._tries[leader.id] = tries
                    leader.admitted_at = None
                    kept.update(task.id for task in (leader, *leader.siblings))
            told = [self._forget(i, "error", why) for i in list(self._tasks) if i not in kept]
        self._deliver(told)

    def _end(self, why: str) -> None:
        with self._lock:
            self._connected = False
            self._ended = why
            told = [self._forget(i, "error", why) for i in list(self._tasks)]
        self._known.set()
        self._deliver(told)

    def _forget(self, task_id: int, reason: Any, error: str | None) -> Update:
        task = self._tasks.pop(task_id)
        self._leaders.pop(task_id, None)
        self._tries.pop(task_id, None)
        task.finish_reason, task.error = reason, error
        return Update(task, [], [], reason)


class RemoteEvents(EventLog):
    """The events of a loop in another process, which sends them while somebody reads."""

    __slots__ = ("_send",)

    def __init__(self, send: Callable[[Any], None]) -> None:
        super().__init__()
        self._send = send

    def attach(self, reader: Reader) -> None:
        first = not self
        super().attach(reader)  # before it is said: a child that connects meanwhile hears of it too
        if first:
            self._send(Watch(True))

    def detach(self, reader: Reader) -> None:
        super().detach(reader)
        if not self:
            self._send(Watch(False))

    def request_snapshot(self) -> None:
        self._send(Snapshot())

    def replay(self, events: list[tuple[int, str, tuple[Any, ...]]]) -> None:
        """Hand over what came, in order."""
        for self.tick, kind, values in events:
            self.emit(kind, *values)


def _nobody(updates: list[Update]) -> None:
    """Before `connect` no request can be open."""


def _exit_name(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
