"""The real scheduler and books under a virtual clock: what a configuration would do with a load."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from astrai.config import SchedulerConfig
from astrai.front.sampling_params import SamplingParams
from astrai.inference.cache.books import Books
from astrai.inference.engine import Engine, Message
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import NOTHING, Outcome, Plan, Task, Update
from astrai.observe.recording import Recording

PERCENTILES = (50, 90, 99)
_FIT_ROUNDS = 20
_SAYS = Outcome(0)
_PARAMS = SamplingParams()
_WHOLE = SamplingParams(prompt_logprobs=0)


# ── how long a step takes ───────────────────────────────────────────────────────────────────────


class StepTime(NamedTuple):
    """Seconds of a step: base + prefill · prompt tokens + decode · decoding rows + page · pages
    read."""

    base: float
    prefill: float
    decode: float
    page: float

    def seconds(self, n_prefill: int, n_decode: int, n_pages: int) -> float:
        return self.base + self.prefill * n_prefill + self.decode * n_decode + self.page * n_pages


class Fit(NamedTuple):
    step_time: StepTime
    n_steps: int
    n_outliers: int  # steps that something else held up, given little weight
    residual: float  # root mean square of the others, seconds
    mean: float  # of all steps, seconds

    def __str__(self) -> str:
        base, prefill, decode, page = (1e6 * value for value in self.step_time)
        return (
            f"step = {base:.0f} µs + {prefill:.2f} µs a prompt token + {decode:.1f} µs a decoding "
            f"row + {page:.2f} µs a page read\n"
            f"  fitted on {self.n_steps} steps of {1e3 * self.mean:.2f} ms on average, "
            f"{self.n_outliers} of them outliers; residual of the others "
            f"{1e3 * self.residual:.2f} ms"
        )


class Step(NamedTuple):
    """What a step had to do, and how long it took."""

    n_prefill: int
    n_decode: int
    n_pages: int
    seconds: float


def steps_of(recording: Recording) -> Iterator[Step]:
    """The steps of a recording with the seconds from one to the next.

    Without overlap that is the time from plan to plan, whatever it was spent on. With overlap it is
    the time the device had for the plan: from its launch, or the end of the plan before it, to the
    moment its results were read.
    """
    header = recording.header
    page_size, overlapped = header.page_size, header.depth > 0
    at: dict[int, int] = {}  # task → positions computed
    work: dict[int, tuple[int, int, int]] = {}  # tick → what its plan has to do
    launched: dict[int, float] = {}
    read_at = planned_at = 0.0
    for step in recording.steps():
        n_prefill = n_decode = n_pages = 0
        for tick, kind, values in (*step.before, *step.events):
            if kind == "admit":
                at[values[0]] = values[2]
            elif kind == "prefill":
                task, start, count = values
                at[task] = start + count
                n_prefill += count
                n_pages += -(-at[task] // page_size)
            elif kind == "decode":
                n_decode = len(values[0])
                for task in values[0]:
                    at[task] += 1
                    n_pages += -(-at[task] // page_size)
            elif kind == "end":
                at.pop(values[0], None)
            elif kind == "launch":
                launched[values[0]] = values[1]
            elif kind == "read" and overlapped:
                began = max(launched.pop(values[0]), read_at)
                read_at = values[2]
                yield Step(*work.pop(values[0]), read_at - began)
            elif kind == "tick":
                if not overlapped and (done := work.pop(tick - 1, None)):
                    yield Step(*done, values[0] - planned_at)
                planned_at = values[0]
                if n_pages:
                    work[tick] = (n_prefill, n_decode, n_pages)


def fit(steps: Iterable[Step]) -> Fit:
    """Least squares that steps held up by something else cannot pull far.

    Steps further than 3 spreads from the fit weigh less in the next round, in inverse proportion
    (Huber's weights; the spread is 1.4826 median absolute residuals). A term that would be negative
    is left out, since no work takes less than none.
    """
    import numpy as np

    table = np.array(list(steps), dtype=float)
    if len(table) < 8:
        raise ValueError(f"{len(table)} steps to fit a step time on, expected at least 8")
    seconds = table[:, 3]
    terms = np.column_stack([np.ones(len(table)), table[:, :3]])
    weights = np.ones(len(table))
    for _ in range(_FIT_ROUNDS):
        values = _solved(terms, seconds, np.sqrt(weights))
        rest = np.abs(seconds - terms @ values)
        border = max(3 * 1.4826 * float(np.median(rest)), 1e-9)
        weights = border / np.maximum(rest, border)
    near = rest <= border
    residual = math.sqrt(float((rest[near] ** 2).mean()))
    step_time = StepTime(*(float(value) for value in values))
    return Fit(step_time, len(table), int((~near).sum()), residual, float(seconds.mean()))


def _solved(terms: Any, seconds: Any, weights: Any) -> Any:
    """float64[4], none negative: what is most negative is left out until none is."""
    import numpy as np

    scale = np.maximum(terms.max(axis=0), 1.0)
    kept = list(range(terms.shape[1]))
    while True:
        columns = terms[:, kept] / scale[kept] * weights[:, None]
        found = np.linalg.lstsq(columns, seconds * weights, rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    values = np.zeros(terms.shape[1])
    values[kept] = np.maximum(found, 0.0) / scale[kept]
    return values


# ── workloads ───────────────────────────────────────────────────────────────────────────────────


class Request(NamedTuple):
    """A request that arrives `at` seconds and will say so many tokens in each of its choices."""

    at: float
    n_prompt: int
    outputs: tuple[int, ...]
    prefix: int = -1  # requests of one group begin with the same `n_prefix` tokens
    n_prefix: int = 0
    priority: int = 0
    prompt: Sequence[int] | None = None  # the tokens themselves, where they are known
    whole: bool = False  # takes no page of its prompt from the prefix cache
    # Of each choice: position → token, where what it said is known and not just anything.
    said: tuple[dict[int, int], ...] = ()


class Shape(NamedTuple):
    """Of generated requests: lognormal lengths, clipped to 8 times the median."""

    prompt: int = 200  # median tokens
    output: int = 100
    sigma: float = 1.0
    prefixes: int = 10  # different shared beginnings
    n_prefix: int = 256  # tokens of each
    shared: float = 0.0  # share of the requests that have one


def generated(n: int, rate: float, shape: Shape, seed: int) -> Iterator[Request]:
    """`n` requests in a Poisson stream of `rate` a second; rate 0: all at once."""
    rng = random.Random(seed)
    at = 0.0
    for _ in range(n):
        at += rng.expovariate(rate) if rate > 0 else 0.0
        n_prompt = _length(rng, shape.prompt, shape.sigma)
        n_output = _length(rng, shape.output, shape.sigma)
        prefix, n_prefix = -1, 0
        if shape.shared and rng.random() < shape.shared:
            prefix, n_prefix = rng.randrange(shape.prefixes), shape.n_prefix
        yield Request(at, n_prefix + n_prompt, (n_output,), prefix, n_prefix)


def _length(rng: random.Random, median: int, sigma: float) -> int:
    return min(max(round(rng.lognormvariate(math.log(median), sigma)), 1), 8 * median)


_FIELDS = {"at", "prompt", "output", "prefix", "prefix_tokens", "priority", "n"}


def read_workload(path: Path) -> Iterator[Request]:
    """Requests of a JSONL file, in order of arrival, read as they are needed.

    A line: {"at": seconds, "prompt": tokens or a list of token ids, "output": tokens}, and where
    wanted "prefix": a name, "prefix_tokens": how many of the prompt's first tokens all requests of
    that name share, "priority", "n": choices. Raises ValueError with file and line.
    """
    names: dict[str, int] = {}
    before = 0.0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                request = _request(json.loads(line), names)
                if request.at < before:
                    raise ValueError(f"at = {request.at}, expected at least {before}, as before")
            except (ValueError, TypeError, KeyError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, line {number}: {what}") from None
            before = request.at
            yield request


def _request(fields: Any, names: dict[str, int]) -> Request:
    if not isinstance(fields, dict):
        raise ValueError(f"a {type(fields).__name__}, expected an object")
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}, known are {', '.join(sorted(_FIELDS))}")
    prompt = fields["prompt"]
    ids = [int(token) for token in prompt] if isinstance(prompt, list) else None
    n_prompt = int(prompt) if ids is None else len(ids)
    n_output, n = int(fields["output"]), int(fields.get("n", 1))
    n_prefix = int(fields.get("prefix_tokens", 0))
    if n_prompt < 1 or n_output < 1 or n < 1 or not 0 <= n_prefix <= n_prompt:
        raise ValueError(
            f"{n_prompt = }, {n_output = }, {n = }, prefix_tokens = {n_prefix}, expected at least "
            "1, 1, 1 and 0 to the prompt's length"
        )
    return Request(
        at=float(fields.get("at", 0.0)),
        n_prompt=n_prompt,
        outputs=(n_output,) * n,
        prefix=names.setdefault(str(fields.get("prefix", "")), len(names)),
        n_prefix=n_prefix,
        priority=int(fields.get("priority", 0)),
        prompt=ids,
    )


# ── the run ─────────────────────────────────────────────────────────────────────────────────────


class _Launched(NamedTuple):
    runner: SimulatedRunner
    done: float
    outcomes: list[Outcome]

    def wait(self) -> list[Outcome]:
        self.runner.now = max(self.runner.now, self.done)
        return self.outcomes


class SimulatedRunner:
    """A device that takes `step_time` for a plan, one plan after the other, and says nothing new.

    Owns the virtual clock: `now`, in seconds.
    """

    def __init__(self, step_time: StepTime, page_size: int, depth: int) -> None:
        self.step_time = step_time
        self.depth = depth
        self.now = 0.0
        self.n_launches = 0
        self.n_entries = 0
        self.n_positions = 0
        self.said: dict[Task, dict[int, int]] = {}  # position → token, where it is known
        self._page_size = page_size
        self._free_at = 0.0  # when the device is done with what it has

    def clock(self) -> float:
        return self.now

    def launch(self, plan: Plan) -> _Launched:
        size = self._page_size
        n_pages = n_positions = 0
        outcomes = []
        for task, start, n, samples, _ in plan.entries.values():
            n_positions += n
            n_pages += (start + n + size - 1) // size
            if not samples:
                outcomes.append(NOTHING)
            elif task in self.said:
                outcomes.append(Outcome(self.said[task].get(start + n, 0)))
            else:
                outcomes.append(_SAYS)
        n_decode = sum(map(len, plan.groups))
        seconds = self.step_time.seconds(n_positions - n_decode, n_decode, n_pages)
        self._free_at = max(self.now, self._free_at) + seconds
        self.n_launches += 1
        self.n_entries += len(outcomes)
        self.n_positions += n_positions
        return _Launched(self, self._free_at, outcomes)


class Report(NamedTuple):
    """What a simulated load came to. Seconds are virtual, unless they say host."""

    n_requests: int
    n_refused: int  # could never fit
    tokens_in: int
    tokens_out: int
    seconds: float
    n_ticks: int
    n_preemptions: int
    cached_tokens: int  # of prompts, found in the prefix cache at first admission
    waits: dict[str, int]  # reason → ticks in which the head of the queue waited for it
    occupancy: float  # mean share of the slots in a launch
    pages_held: int  # at most at once, after a tick
    ttft: tuple[float, ...]  # at PERCENTILES
    e2e: tuple[float, ...]
    inter_token: tuple[float, ...]
    host_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_out / self.seconds if self.seconds else 0.0

    @property
    def host_us_per_tick(self) -> float:
        return 1e6 * self.host_seconds / max(self.n_ticks, 1)

    def lines(self) -> list[str]:
        def ms(values: tuple[float, ...]) -> str:
            return " ".join(f"{1e3 * value:>11.1f}" for value in values)

        waits = ", ".join(f"{n} for {reason}" for reason, n in self.waits.items() if n) or "none"
        heads = " ".join(f"{'p' + str(p):>11}" for p in PERCENTILES)
        return [
            f"{self.n_requests} requests ({self.n_refused} could never fit), {self.tokens_in} "
            f"tokens in ({self.cached_tokens} from the prefix cache), {self.tokens_out} out",
            f"{self.tokens_per_second:.1f} tok/s, "
            f"{self.n_requests / self.seconds if self.seconds else 0.0:.2f} requests/s over "
            f"{self.seconds:.1f} s; {self.n_ticks} ticks",
            f"slots {100 * self.occupancy:.1f} % used, at most {self.pages_held} pages held, "
            f"{self.n_preemptions} preemptions; ticks of waiting: {waits}",
            f"ms                {heads}",
            f"  first token     {ms(self.ttft)}",
            f"  between tokens  {ms(self.inter_token)}",
            f"  whole request   {ms(self.e2e)}",
            f"host: {self.host_us_per_tick:.1f} µs a tick, {self.host_seconds:.1f} s in all",
        ]

    def record(self) -> dict[str, Any]:
        """For the JSON line."""
        names = [f"p{p}" for p in PERCENTILES]
        plain = self._asdict()
        for name in ("ttft", "e2e", "inter_token"):
            plain[name] = dict(zip(names, (round(v, 6) for v in plain[name])))
        return {
            **plain,
            "seconds": round(self.seconds, 6),
            "occupancy": round(self.occupancy, 4),
            "host_seconds": round(self.host_seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "host_us_per_tick": round(self.host_us_per_tick, 2),
        }


class Setting(NamedTuple):
    """What an engine is like, but for its model."""

    scheduler: SchedulerConfig
    n_pages: int
    page_size: int = 64
    prefix_cache: bool = True
    depth: int = 0  # launches that may be unread when the next is planned


class Simulator:
    """Puts a stream of requests through a fresh engine whose device is a formula.

    Requests are made into tasks as they arrive and forgotten as they end, so that a million of them
    need the memory of those that are open at once and four numbers each.

    Owns the engine, the clock (its runner's) and the numbers.
    """

    def __init__(self, setting: Setting, step_time: StepTime) -> None:
        events = EventLog()
        self.books = Books(setting.n_pages, setting.page_size, setting.prefix_cache, events)
        self.runner = SimulatedRunner(step_time, setting.page_size, setting.depth)
        self.scheduler = Scheduler(setting.scheduler, self.books, self.runner.clock, events)
        self.engine = Engine(self.scheduler, self.runner, self._deliver)
        self._n_tasks = 0
        self._n_requests = self._n_refused = 0
        self._tokens_in = self._cached = 0
        self._held = 0
        self._arrived: dict[Task, float] = {}
        self._ttft, self._e2e, self._inter = array("d"), array("d"), array("d")

    def run(self, requests: Iterable[Request]) -> Report:
        """The whole stream, to its end. Raises ValueError from the stream as it is read."""
        stream = iter(requests)
        coming = next(stream, None)
        engine, runner, pool = self.engine, self.runner, self.books.pool
        began = time.perf_counter()
        with _collector_paused():
            while True:
                while coming is not None and coming.at <= runner.now:
                    self._arrive(coming)
                    coming = next(stream, None)
                if not engine.idle:
                    engine.step()
                    self._held = max(self._held, pool.counts.held)
                elif coming is None:
                    break
                else:
                    runner.now = coming.at
        host_seconds = time.perf_counter() - began
        self.scheduler.check()
        return self._report(host_seconds)

    def _arrive(self, request: Request) -> None:
        prompt = self._prompt(request)
        tasks = []
        for index, n_output in enumerate(request.outputs):
            task = Task(
                id=self._n_tasks,
                request_id="",
                prompt=prompt,
                params=_WHOLE if request.whole else _PARAMS,
                max_tokens=n_output,
                seed=0,
                priority=request.priority,
                index=index,
            )
            self._n_tasks += 1
            self._arrived[task] = request.at
            if index < len(request.said):
                self.runner.said[task] = request.said[index]
            tasks.append(task)
        tasks[0].siblings = tasks[1:]
        self._n_requests += 1
        self.engine.post(Message(add=[tasks[0]]))

    def _prompt(self, request: Request) -> list[int]:
        """Tokens that no other request has, but for the shared beginning."""
        if request.prompt is not None:
            return list(request.prompt)
        own = [self._n_tasks] * (request.n_prompt - request.n_prefix)
        return [-1 - request.prefix] * request.n_prefix + own

    def _deliver(self, updates: list[Update]) -> None:
        for task, _, _, reason in updates:
            if reason is None:
                continue
            at = self._arrived.pop(task)
            self.runner.said.pop(task, None)
            if reason == "error":
                self._n_refused += task.index == 0
                continue
            if task.index == 0:
                self._tokens_in += task.n_prompt
                self._cached += task.n_cached
            first, ended = task.first_token_at, task.ended_at
            if first is None or ended is None:
                continue  # it was to say nothing
            self._ttft.append(first - at)
            self._e2e.append(ended - at)
            if task.n_output > 1:
                self._inter.append((ended - first) / (task.n_output - 1))

    def _report(self, host_seconds: float) -> Report:
        scheduler, runner = self.scheduler, self.runner
        return Report(
            n_requests=self._n_requests,
            n_refused=self._n_refused,
            tokens_in=self._tokens_in,
            tokens_out=scheduler.n_output,
            seconds=runner.now,
            n_ticks=scheduler.n_tick,
            n_preemptions=scheduler.n_preemptions,
            cached_tokens=self._cached,
            waits=dict(scheduler.wait_ticks),
            occupancy=runner.n_entries / max(runner.n_launches * scheduler.config.max_slots, 1),
            pages_held=self._held,
            ttft=percentiles(self._ttft),
            e2e=percentiles(self._e2e),
            inter_token=percentiles(self._inter),
            host_seconds=host_seconds,
        )


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Ended tasks are in no cycle, so counting references frees them; walking hundreds of thousands
    of waiting ones again and again took a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def percentiles(values: array[float]) -> tuple[float, ...]:
    """At PERCENTILES; zeros of nothing."""
    if not values:
        return (0.0,) * len(PERCENTILES)
    import numpy as np

    found = np.percentile(np.frombuffer(values, dtype=float), PERCENTILES)
    return tuple(float(value) for value in found)
