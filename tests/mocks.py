"""A model without arithmetic: it reads its own page frames, so wrong books give wrong tokens."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from astrai.config import SchedulerConfig
from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.cache.books import Books
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import NOTHING, Entry, Outcome, Plan, Task, TokenLogprob, Update

VOCAB = 97


class Clock:
    """A virtual clock: one second per reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def next_token(tokens: Sequence[int], seed: int) -> int:
    """What the mock says after `tokens`: any change of any earlier token changes it."""
    return zlib.crc32(repr((list(tokens), seed)).encode()) % VOCAB


def oracle(
    prompt: Sequence[int], n: int, seed: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """The output of a task that has the machine to itself."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens, seed))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


class MockLaunch:
    def __init__(self, items: list[Outcome]) -> None:
        self.items = items

    def wait(self) -> list[Outcome]:
        return self.items


class MockRunner:
    """Stores token ids where K and V would be, and checks what no launch may do."""

    def __init__(self, books: Books, depth: int = 0) -> None:
        self.books = books
        self.depth = depth
        self.frames = [[-1] * books.page_size for _ in range(books.pool.n_pages)]
        self.last: dict[int, int] = {}  # the token of each task that stays on the device
        self.n_launches = 0
        self.n_positions = 0
        self.fail_on: set[int] = set()  # task ids whose entries make the whole launch raise
        self.nan_on: set[int] = set()  # task ids whose row has no usable logits

    def launch(self, plan: Plan) -> MockLaunch:
        self.n_launches += 1
        for frame in plan.clears:
            self.frames[frame] = [-1] * self.books.page_size
        for source, target in plan.copies:
            self.frames[target] = list(self.frames[source])
        written: dict[tuple[int, int], int] = {}
        for task, entry in plan.entries.items():
            if task.id in self.fail_on:
                raise RuntimeError(f"mock failure for task {task.id}")
            for position in range(entry.start, entry.start + entry.n):
                self._write(task, position, written)
        assert sum(len(group) for group in plan.groups) <= len(plan.entries)
        return MockLaunch([self._outcome(entry) for entry in plan.entries.values()])

    def _outcome(self, entry: Entry) -> Outcome:
        task, start, n, samples, _ = entry
        outcome = self._sample(task, start + n) if samples else self._pooled(entry)
        if not task.wants_prompt_logprobs:
            return outcome
        scored = [TokenLogprob(token, 0.0, 1, ()) for token in task.prompt[start + 1 :][:n]]
        return outcome._replace(prompt_logprobs=scored)

    def _pooled(self, entry: Entry) -> Outcome:
        """The sum of the tokens of the chunk, or what follows the last one, read from its pages."""
        task, start, n, _, _ = entry
        if task.params.pooling == "mean":
            return Outcome(pooled=[float(sum(self._seen(task, start, start + n)))])
        if task.params.pooling == "last" and start + n == task.n_prompt:
            return Outcome(pooled=[float(next_token(self._seen(task, 0, task.n_prompt), 0))])
        return NOTHING

    def _seen(self, task: Task, start: int, end: int) -> list[int]:
        size = self.books.page_size
        return [self.frames[task.page_table[p // size]][p % size] for p in range(start, end)]

    def _write(self, task: Task, position: int, written: dict[tuple[int, int], int]) -> None:
        page, offset = divmod(position, self.books.page_size)
        frame = task.page_table[page]
        assert self.books.pool.refs[frame] == 1, f"task {task.id} writes shared frame {frame}"
        assert written.setdefault((frame, offset), task.id) == task.id, (
            "two tasks write one position"
        )
        known = position < len(task.tokens)
        self.frames[frame][offset] = task.tokens[position] if known else self.last[task.id]
        self.n_positions += 1

    def _sample(self, task: Task, n: int) -> Outcome:
        if task.id in self.nan_on:
            return Outcome(error="logits are not finite")
        token = next_token(self._seen(task, 0, n), task.seed)
        self.last[task.id] = token
        return Outcome(token)


def make_task(
    task_id: int,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    namespace: str = "",
    priority: int = 0,
    params: SamplingParams | None = None,
    index: int = 0,
) -> Task:
    return Task(
        id=task_id,
        request_id=f"r{task_id}",
        prompt=list(prompt),
        params=params or SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        seed=seed,
        stop_ids=stop_ids,
        namespace=namespace,
        priority=priority,
        index=index,
    )


class FreeMatcher:
    """Of a grammar that allows everything."""

    eos_ids: tuple[int, ...] = ()

    def advance(self, token: int) -> bool:
        return False


class SlowGrammars:
    """A compiler of nothing: ready after a few questions, and now and then it refuses."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def matcher(self, structured: StructuredOutput) -> FreeMatcher | None:
        if self.rng.random() < 0.1:
            raise ValueError("grammar: refused")
        return FreeMatcher() if self.rng.random() < 0.4 else None


class Bench:
    """Scheduler, books and mock runner wired as the engine wires them, with outputs collected."""

    def __init__(
        self,
        n_pages: int,
        page_size: int = 4,
        max_slots: int = 4,
        prefill_budget: int = 8,
        prefix_cache: bool = True,
        depth: int = 0,
        **config: object,
    ) -> None:
        self.events = EventLog()
        self.books = Books(n_pages, page_size, prefix_cache, self.events)
        planning = SchedulerConfig(max_slots, prefill_budget, **config)  # type: ignore[arg-type]
        self.scheduler = Scheduler(planning, self.books, Clock(), self.events)
        self.runner = MockRunner(self.books, depth)
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}

    def deliver(self, updates: list[Update]) -> None:
        for update in updates:
            self.outputs.setdefault(update.task.id, []).extend(update.token_ids)
            if update.finish_reason is not None:
                assert update.task.id not in self.ends, "a task ended twice"
                self.ends[update.task.id] = update.finish_reason
