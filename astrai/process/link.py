"""The engine's loop as its edge sees it, whichever process it runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from astrai.config import EngineConfig
from astrai.front.intake import Limits
from astrai.inference.engine import Engine, Health, Message
from astrai.inference.events import EventLog
from astrai.inference.task import Update
from astrai.models.tokenizer import Tokenizer
from astrai.observe.recorder import Recorder

Deliver = Callable[[list[Update]], None]


class Budget(NamedTuple):
    """What the engine keeps in memory, in bytes, and what was decided at start."""

    weights: int
    workspace: int
    kv: int
    kv_tokens: int
    max_model_len: int
    dtype: str
    device: str
    load_seconds: float

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.kv

    def lines(self) -> list[str]:
        mib = 1 << 20
        workspace = f"workspace{self.workspace / mib:8.1f} MiB  activations and samplers"
        return [
            f"weights  {self.weights / mib:8.1f} MiB  {self.dtype} on {self.device}",
            *([workspace] if self.workspace else []),
            f"KV pool  {self.kv / mib:8.1f} MiB  {self.kv_tokens} tokens, taken as they are used",
            f"total    {self.total / mib:8.1f} MiB  in {self.load_seconds:.1f} s",
        ]


class Front(NamedTuple):
    """What an edge needs to know of an engine: plain data that never changes."""

    config: EngineConfig  # with what was decided in place of None
    limits: Limits
    tokenizer: Tokenizer
    model_name: str
    budget: Budget


class Assembled(NamedTuple):
    """What loading makes; the loop is not started."""

    front: Front
    engine: Engine
    recorder: Recorder | None


class Link(Protocol):
    """A loop, and the way to it. `post`, `health` and the events may be used in any thread."""

    @property
    def events(self) -> EventLog: ...

    def connect(self, deliver: Deliver) -> Front:
        """Wait until the model is loaded. `deliver(updates)` is called in a thread of the link.

        Raises what loading raised.
        """

    def start(self) -> None: ...

    def stop(self) -> None:
        """End the loop after its present tick; what still runs ends with an error."""

    def post(self, message: Message) -> None:
        """Hand over tasks or aborts. Every task that was added is told how it ended."""

    def health(self) -> Health: ...

    @property
    def ended(self) -> str | None:
        """Why the loop ended for good, if it did."""


class ThreadLink:
    """The loop in a thread of this process.

    Owns the engine and its recorder between `connect` and `stop`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.events = EventLog()
        self._engine: Engine | None = None
        self._recorder: Recorder | None = None

    def connect(self, deliver: Deliver) -> Front:
        from astrai.runtime.assemble import assemble

        parts = assemble(self._config, deliver)
        self.events = parts.engine.scheduler.events
        self._engine, self._recorder = parts.engine, parts.recorder
        return parts.front

    @property
    def _loop(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the link is not connected")
        return self._engine

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        self._loop.stop()
        if self._recorder is not None:
            self._recorder.close()

    def post(self, message: Message) -> None:
        self._loop.post(message)

    def health(self) -> Health:
        return self._loop.health()

    @property
    def ended(self) -> str | None:
        return self._loop.failure
