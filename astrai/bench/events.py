"""What listening costs: tokens a second with and without a recorder, and host µs a tick."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astrai.bench._common import finish, load, median, parser, run, w_cpu, with_model
from astrai.bench._null import engine_of, tasks_of
from astrai.config import SchedulerConfig
from astrai.inference.engine import Engine, Message
from astrai.observe.recorder import Recorder

if TYPE_CHECKING:
    from astrai.front.llm import LLM

_TASKS = (8, 256)
_TICKS = 200


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("events", __doc__))
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--repeat", type=int, default=7, help="pairs of runs")
    options.add_argument("--host-only", action="store_true", help="no model: host µs a tick")
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU time, for a machine that others use; with --threads 1",
    )
    args = options.parse_args(argv)
    lines, result = _host(args)
    if not args.host_only:
        more, measured = _throughput(args)
        lines += more
        result |= measured
    finish(args, "events", lines, result)


def _throughput(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Runs in pairs, the order within a pair changing, so that a slow minute hits both."""
    llm = load(args)
    requests = w_cpu(llm.tokenizer, args.seed, args.requests)
    n_out = sum(request.max_tokens for request in requests)
    run(llm, w_cpu(llm.tokenizer, args.seed + 1, 4))
    clock = time.process_time if args.cpu_time else time.perf_counter
    plain: list[float] = []
    recorded: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        for i in range(args.repeat):
            for listened in (i % 2 == 0, i % 2 == 1):
                recorder = _attached(llm, path) if listened else None
                began = clock()
                run(llm, requests)
                rate = n_out / (clock() - began)
                (recorded if listened else plain).append(rate)
                if recorder is not None:
                    llm.events.detach(recorder)
                    recorder.close()
        size = path.stat().st_size
    ratios = sorted(b / a for a, b in zip(plain, recorded))
    lost = 100 * (1 - statistics.median(ratios))
    lines = [
        f"W-CPU: {statistics.median(plain):.1f} tok/s with nobody listening, "
        f"{statistics.median(recorded):.1f} with a recorder",
        f"  in pairs the recorder costs {lost:.1f} % (median of {len(ratios)}; from "
        f"{100 * (1 - ratios[-1]):.1f} to {100 * (1 - ratios[0]):.1f} %)",
        f"  {size / n_out:.0f} bytes for each token said",
    ]
    return lines, {
        "tokens_per_second": [round(rate, 1) for rate in plain],
        "tokens_per_second_recorded": [round(rate, 1) for rate in recorded],
        "cpu_time": args.cpu_time,
        "cost_percent": round(lost, 2),
        "bytes_per_token": round(size / n_out, 1),
    }


def _attached(llm: LLM, path: Path) -> Recorder:
    recorder = Recorder(path, llm.engine.scheduler, {"depth": llm.engine.runner.depth})
    llm.events.attach(recorder)
    return recorder


def _host(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    lines = ["running     µs a tick: nobody   recorder"]
    result = {}
    for n_tasks in _TASKS:
        plain = median(lambda n=n_tasks: _tick(n, False), args.repeat)  # type: ignore[misc]
        recorded = median(lambda n=n_tasks: _tick(n, True), args.repeat)  # type: ignore[misc]
        lines.append(f"{n_tasks:>7} {plain:>19.1f} {recorded:>10.1f}")
        result[str(n_tasks)] = {"plain": round(plain, 2), "recorder": round(recorded, 2)}
    return lines, {"tick_us": result}


def _tick(n_tasks: int, listened: bool) -> float:
    """µs of CPU time of one decode tick on a device that computes nothing."""
    config = SchedulerConfig(max_slots=n_tasks, prefill_budget=16 * n_tasks, group_decode="off")
    engine = engine_of(config, n_pages=8 * n_tasks)
    with tempfile.TemporaryDirectory() as folder:
        scheduler = engine.scheduler
        recorder = Recorder(Path(folder) / "run.jsonl", scheduler, {"depth": 0})
        if listened:
            scheduler.events.attach(recorder)
        engine.post(Message(add=tasks_of([(8 + i % 64, 2 * _TICKS) for i in range(n_tasks)])))
        us = _timed(engine)
        recorder.close()
    return us


def _timed(engine: Engine) -> float:
    while not engine.scheduler.n_tick or any(t.prefilling for t in engine.scheduler.tasks.values()):
        engine.step()
    began = time.process_time()
    for _ in range(_TICKS):
        engine.step()
    return (time.process_time() - began) / _TICKS * 1e6
