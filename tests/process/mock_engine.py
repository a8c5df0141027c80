"""An engine without a model for a process of its own: bytes in, what the mock says out."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

from astrai.config import EngineConfig, SchedulerConfig
from astrai.front.intake import Limits
from astrai.inference.cache.books import Books
from astrai.inference.engine import Engine
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Plan
from astrai.models.tokenizer import ByteTokenizer
from astrai.process.link import Assembled, Budget, Deliver, Front
from tests.mocks import MockLaunch, MockRunner

BUILDER = "tests.process.mock_engine:build"
TICK_SECONDS = 0.002
# Bytes that make the process misbehave when a prompt with them is computed.
KILL, HANG, BREAK, SLOW = 201, 202, 203, 204


class Runner(MockRunner):
    scheduler: Scheduler

    def launch(self, plan: Plan) -> MockLaunch:
        for task, entry in plan.entries.items():
            if entry.start == 0:
                self._misbehave(task.prompt)
            if SLOW in task.prompt:
                time.sleep(0.01)
        time.sleep(TICK_SECONDS)
        return super().launch(plan)

    def _misbehave(self, prompt: list[int]) -> None:
        if KILL in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in prompt:
            time.sleep(3600)
        if BREAK in prompt:
            self.scheduler.tick = None  # type: ignore[assignment]


def build(config: EngineConfig, deliver: Deliver) -> Assembled:
    if config.model == "no-such-model":
        raise FileNotFoundError(2, "No such file or directory", "no-such-model")
    n_pages = (config.kv_tokens or 64 * config.page_size) // config.page_size
    slots = config.max_slots or 8
    config = replace(config, max_slots=slots)
    events = EventLog()
    books = Books(n_pages, config.page_size, config.prefix_cache, events)
    scheduler = Scheduler(SchedulerConfig(max_slots=slots), books, time.monotonic, events)
    runner = Runner(books)
    runner.scheduler = scheduler
    limits = Limits(n_pages * config.page_size, 258, (257,), n_pages, config.page_size)
    budget = Budget(0, 0, 0, n_pages * config.page_size, limits.max_model_len, "none", "cpu", 0.0)
    front = Front(config, limits, ByteTokenizer(), "mock", budget)
    return Assembled(front, Engine(scheduler, runner, deliver, config.stall_seconds), None)
