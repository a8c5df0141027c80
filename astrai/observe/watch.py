"""The readers of a server, together: metrics and the story of each request."""

from __future__ import annotations

from typing import Any, Protocol

from astrai.inference.events import Reader
from astrai.observe.metrics import Metrics
from astrai.observe.ticks import Ticks
from astrai.observe.why import Why, WhyReader


class Events(Protocol):
    def attach(self, reader: Reader) -> None: ...


class Watched(Protocol):
    """What is asked of an engine."""

    @property
    def events(self) -> Events: ...

    def stats(self) -> dict[str, Any]: ...


class Watch:
    """Owns the readers of one engine, which listen from `attach` on."""

    def __init__(self, engine: Watched) -> None:
        self._engine = engine
        self._stories = WhyReader()
        self.metrics = Metrics(
            lambda: int(engine.stats().get("pages_total", 0)),
            lambda: int(engine.stats().get("slots_total", 0)),
        )

    def attach(self) -> None:
        self._engine.events.attach(Ticks(self.metrics.apply, self._stories.apply))

    def why(self, request_id: str) -> Why | None:
        """Where the time of a live or recently ended request went. Any thread."""
        return self._stories.why(request_id)
