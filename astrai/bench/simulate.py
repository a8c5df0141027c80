"""Predicted against measured: a step time fitted on one load, another load simulated and run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from astrai.bench._common import Request, finish, load, parser, run, w_cpu, with_model
from astrai.front.llm import LLM
from astrai.observe import simulate
from astrai.observe.recorder import Recorder
from astrai.observe.recording import Recording


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("simulate", __doc__))
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--repeat", type=int, default=5, help="pairs of runs")
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU time, for a machine that others use; with --threads 1",
    )
    args = options.parse_args(argv)
    llm = load(args)
    if args.cpu_time:
        llm.engine.scheduler.clock = time.process_time
    known = w_cpu(llm.tokenizer, args.seed, args.requests)
    other = w_cpu(llm.tokenizer, args.seed + 1, args.requests)
    run(llm, w_cpu(llm.tokenizer, args.seed + 2, 4))
    pairs = [_pair(llm, known, other) for _ in range(args.repeat)]
    off = statistics.median(pair.off for pair in pairs)
    lines = [
        *str(pairs[0].fit).splitlines(),
        f"W-CPU, seed {args.seed} fitted, seed {args.seed + 1} predicted and run:",
        "  predicted   measured tok/s   off      ticks predicted and taken",
    ]
    for pair in pairs:
        lines.append(
            f"  {pair.predicted:>9.1f}   {pair.measured:>8.1f}   {100 * pair.off:>+8.1f} %   "
            f"{pair.ticks_predicted} {pair.ticks}"
        )
    lines.append(f"  off by {100 * off:+.1f} % (median)")
    result = {
        "predicted_tokens_per_second": [round(pair.predicted, 2) for pair in pairs],
        "measured_tokens_per_second": [round(pair.measured, 2) for pair in pairs],
        "off_percent": round(100 * off, 2),
        "ticks_predicted": pairs[0].ticks_predicted,
        "ticks": pairs[0].ticks,
        "cpu_time": args.cpu_time,
        "step_time": [pair.fit.step_time._asdict() for pair in pairs],
    }
    finish(args, "simulate", lines, result)


class Pair(NamedTuple):
    """One load recorded and fitted, then at once the other predicted and run."""

    fit: simulate.Fit
    predicted: float  # tokens a second
    measured: float
    ticks_predicted: int
    ticks: int

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


def _pair(llm: LLM, known: Sequence[Request], other: Sequence[Request]) -> Pair:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        _record(llm, known, path)
        fitted = simulate.fit(simulate.steps_of(Recording(path)))
    report = simulate.Simulator(_setting(llm), fitted.step_time).run(
        simulate.Request(0.0, len(r.prompt_ids), (r.max_tokens,)) for r in other
    )
    clock = llm.engine.scheduler.clock
    began = clock()
    done = run(llm, other)
    measured = sum(request.max_tokens for request in other) / (clock() - began)
    return Pair(fitted, report.tokens_per_second, measured, report.n_ticks, done.ticks)


def _record(llm: LLM, requests: Sequence[Request], path: Path) -> None:
    engine = llm.engine
    recorder = Recorder(path, engine.scheduler, {"depth": engine.runner.depth})
    llm.events.attach(recorder)
    run(llm, requests)
    llm.events.detach(recorder)
    recorder.close()


def _setting(llm: LLM) -> simulate.Setting:
    engine = llm.engine
    books = engine.scheduler.books
    return simulate.Setting(
        engine.scheduler.config,
        books.pool.n_pages,
        books.page_size,
        books.prefix_cache,
        engine.runner.depth,
    )
