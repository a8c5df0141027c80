"""The real scheduler and books with a runner that computes nothing: what the host alone costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from astrai.config import SchedulerConfig
from astrai.front.sampling_params import SamplingParams
from astrai.inference.cache.books import Books
from astrai.inference.engine import Engine, Message
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import NOTHING, Done, Outcome, Plan, Task, Update


class NullRunner:
    """Samples token 0 for every entry that samples. `busy` sums the entries of all launches."""

    depth = 0

    def __init__(self) -> None:
        self.busy = 0
        self.launches = 0
        self._token = Outcome(0)

    def launch(self, plan: Plan) -> Done:
        self.busy += len(plan.entries)
        self.launches += 1
        return Done([self._token if e.samples else NOTHING for e in plan.entries.values()])


class Simulation(NamedTuple):
    ticks: int
    occupancy: float  # mean share of the slots in use
    seconds: float


def engine_of(config: SchedulerConfig, n_pages: int, page_size: int = 64) -> Engine:
    events = EventLog()
    books = Books(n_pages, page_size, False, events)
    return Engine(Scheduler(config, books, time.monotonic, events), NullRunner(), _ignore)


def tasks_of(shapes: Sequence[tuple[int, int]]) -> list[Task]:
    """One task per (prompt tokens, output tokens)."""
    params = SamplingParams(temperature=0.0)
    return [
        Task(
            id=i,
            request_id=str(i),
            prompt=[0] * n_prompt,
            params=params,
            max_tokens=n_output,
            seed=0,
        )
        for i, (n_prompt, n_output) in enumerate(shapes)
    ]


def simulate(config: SchedulerConfig, shapes: Sequence[tuple[int, int]]) -> Simulation:
    """Ticks that the requests take in a pool that never runs dry."""
    n_pages = sum((a + b) // 64 + 1 for a, b in shapes)
    engine = engine_of(config, n_pages)
    engine.post(Message(add=tasks_of(shapes)))
    started = time.perf_counter()
    while not engine.idle:
        engine.step()
    runner = engine.runner
    if not isinstance(runner, NullRunner):
        raise TypeError(f"{type(runner).__name__} is not a NullRunner")
    occupancy = runner.busy / (runner.launches * config.max_slots)
    return Simulation(runner.launches, occupancy, time.perf_counter() - started)


def _ignore(updates: list[Update]) -> None:
    """Nobody listens."""
