"""The real engine, scheduler and books over a model without arithmetic, that takes its time."""

from __future__ import annotations

import random
import time

from astrai.config import EngineConfig, SchedulerConfig
from astrai.front.async_engine import AsyncEngine
from astrai.front.intake import Limits
from astrai.inference.cache.books import Books
from astrai.inference.engine import Engine, Health, Message
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Outcome, Plan, Task
from astrai.models.tokenizer import ByteTokenizer
from astrai.process.link import Budget, Deliver, Front
from tests.mocks import MockLaunch, MockRunner

LETTERS = b"etaoin shrdlu "


class Typist(MockRunner):
    """Says letters, `tick_seconds` apart."""

    def __init__(self, books: Books, tick_seconds: float) -> None:
        super().__init__(books)
        self.tick_seconds = tick_seconds
        self._random = random.Random(0)

    def launch(self, plan: Plan) -> MockLaunch:
        time.sleep(self.tick_seconds)
        return super().launch(plan)

    def _sample(self, task: Task, n: int) -> Outcome:
        token = self.last[task.id] = self._random.choice(LETTERS)
        return Outcome(token)


class MockLink:
    """A loop in a thread of this process, without a model."""

    def __init__(self, n_pages: int, slots: int, page_size: int, tick_seconds: float) -> None:
        self.events = EventLog()
        self.config = EngineConfig(max_slots=slots, page_size=page_size)
        self._books = Books(n_pages, page_size, True, self.events)
        planning = SchedulerConfig(max_slots=slots, prefill_budget=256)
        self._scheduler = Scheduler(planning, self._books, time.monotonic, self.events)
        self._runner = Typist(self._books, tick_seconds)
        self._engine: Engine | None = None

    def connect(self, deliver: Deliver) -> Front:
        self._engine = Engine(self._scheduler, self._runner, deliver)
        n_pages, page_size = self._books.pool.n_pages, self._books.page_size
        length = min(4096, n_pages * page_size)
        tokenizer = ByteTokenizer()
        limits = Limits(length, tokenizer.vocab_size, (), n_pages, page_size)
        budget = Budget(0, 0, 0, n_pages * page_size, length, "none", "none", 0.0)
        return Front(self.config, limits, tokenizer, "mock", budget)

    @property
    def loop(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def ended(self) -> str | None:
        return self.loop.failure

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        self.loop.stop()

    def post(self, message: Message) -> None:
        self.loop.post(message)

    def health(self) -> Health:
        return self.loop.health()


def mock_engine(
    n_pages: int = 272, slots: int = 8, page_size: int = 64, tick_seconds: float = 0.01
) -> AsyncEngine:
    return AsyncEngine(link=MockLink(n_pages, slots, page_size, tick_seconds))
