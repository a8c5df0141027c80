"""Host time: µs per tick per running task, and alloc/free of page frames at any pool size."""

from __future__ import annotations

import time
from collections.abc import Sequence

from astrai.bench._common import finish, median, parser
from astrai.bench._null import engine_of, tasks_of
from astrai.config import SchedulerConfig
from astrai.inference.cache.pool import PagePool
from astrai.inference.engine import Message

FRAMES = (8, 64, 1_024, 16_384, 131_072, 1_000_000)
TASKS = (1, 64, 256, 1_024)


def main(argv: Sequence[str]) -> None:
    options = parser("books", __doc__)
    options.add_argument("--ticks", type=int, default=100)
    options.add_argument("--repeat", type=int, default=5)
    args = options.parse_args(argv)
    frames = {n: median(lambda n=n: alloc_free(n), args.repeat) for n in FRAMES}  # type: ignore[misc]
    ticks = {n: median(lambda n=n: tick(n, args.ticks), args.repeat) for n in TASKS}  # type: ignore[misc]
    lines = ["frames      ns per alloc + free"]
    lines += [f"{n:>9}   {ns:6.0f}" for n, ns in frames.items()]
    lines += ["tasks       µs per tick   µs per tick and task"]
    lines += [f"{n:>9}   {us:11.1f}   {us / n:8.2f}" for n, us in ticks.items()]
    result = {
        "alloc_free_ns": {str(n): round(ns, 1) for n, ns in frames.items()},
        "tick_us": {str(n): round(us, 2) for n, us in ticks.items()},
        "tick_us_per_task": {str(n): round(us / n, 3) for n, us in ticks.items()},
    }
    finish(args, "books", lines, result)


def alloc_free(n_frames: int, rounds: int = 40_000) -> float:
    """ns of one alloc and one free, half of the pool being held, in waves across word borders."""
    pool = PagePool(n_frames)
    pool.alloc_n(n_frames // 2)
    wave = min(n_frames // 2, 1_000)
    n_waves = rounds // wave
    started = time.perf_counter_ns()
    for _ in range(n_waves):
        frames = [pool.alloc() for _ in range(wave)]
        for frame in frames:
            pool.free(frame)
    return (time.perf_counter_ns() - started) / (n_waves * wave)


def tick(n_tasks: int, n_ticks: int) -> float:
    """µs of one decode tick with `n_tasks` running: cleanup, plan, page growth, delivery."""
    engine = engine_of(
        SchedulerConfig(max_slots=n_tasks, prefill_budget=16 * n_tasks), n_pages=4 * n_tasks
    )
    engine.post(Message(add=tasks_of([(8 + i % 64, 2 * n_ticks) for i in range(n_tasks)])))
    while (
        any(task.prefilling for task in engine.scheduler.tasks.values())
        or not engine.scheduler.n_tick
    ):
        engine.step()
    started = time.perf_counter_ns()
    for _ in range(n_ticks):
        engine.step()
    return (time.perf_counter_ns() - started) / n_ticks / 1e3
