"""Events in whole ticks, so that what a reader shows is always the state between two ticks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

Batch = list[tuple[str, tuple[Any, ...]]]  # (kind, values) in the order in which they were decided
Apply = Callable[[int, Batch], None]

# Between two ticks there are a few events per task; past this the loop has ended without one.
_MAX_PENDING = 1 << 20


class Ticks:
    """An event reader that hands the events of a tick to `applies` when the tick is over.

    One of them that fails is logged and hears no more: the engine's thread, in which all this may
    run, goes on. Owns the events of the present tick.
    """

    def __init__(self, *applies: Apply) -> None:
        self._applies = list(applies)
        self._pending: Batch = []

    def __call__(self, tick: int, kind: str, values: tuple[Any, ...]) -> None:
        self._pending.append((kind, values))
        if kind == "tick" or len(self._pending) >= _MAX_PENDING:
            batch, self._pending = self._pending, []
            for apply in self._applies[:]:
                try:
                    apply(tick, batch)
                except Exception:
                    logger.exception("a reader of events failed at tick %d and is dropped", tick)
                    self._applies.remove(apply)
