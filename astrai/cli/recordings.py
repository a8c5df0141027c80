"""What the commands on recordings and workloads print."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from astrai.config import SchedulerConfig
from astrai.observe.recording import Recording

if TYPE_CHECKING:
    from astrai.observe.simulate import Report, Request, Setting, Shape, StepTime
    from astrai.observe.whatif import Change

_POOLS = (1, 16, 256)  # times the pages asked for, to see what the books cost
_POOL_REQUESTS = 1000


def replay(path: Path) -> int:
    """Compare a recording with what the scheduler decides now: exit code 0 if nothing differs."""
    from astrai.observe.replay import replay as run

    began = time.perf_counter()
    found = run(Recording(path))
    seconds = time.perf_counter() - began
    if found.difference is not None:
        print(f"{path}: differs first in {found.difference}")
        return 1
    print(
        f"{path}: {found.n_ticks} ticks, {found.n_tasks} tasks, {found.n_events} decisions, "
        f"all as recorded ({seconds:.1f} s)"
    )
    return 0


def what_if(path: Path, change: Change) -> None:
    """Compare the recorded load under another configuration."""
    from astrai.observe.whatif import what_if as ask

    found = ask(Recording(path), change)
    print("\n".join(found.lines()))
    record = {
        "measured": found.measured.record(),
        "simulated": found.recorded.record(),
        "what_if": found.other.record(),
        "step_time": found.fit.step_time._asdict(),
    }
    print(json.dumps(record))


def trace(path: Path, target: Path, ticks: str) -> None:
    """Write the trace of a recording; `ticks` is "", "100:200", "100:" or ":200"."""
    from astrai.observe.trace import write_trace

    first, _, last = ticks.partition(":")
    if not all(part == "" or part.isdecimal() for part in (first, last)):
        raise ValueError(f"{ticks = }, expected FIRST:LAST")
    upto = int(last) if last else int(first) if first and ":" not in ticks else None
    n = write_trace(Recording(path), target, int(first or 0), upto)
    print(f"{target}: {n} events; open it in ui.perfetto.dev or chrome://tracing")


def step_time_of(text: str) -> StepTime:
    """A step time as four numbers (seconds: base, a prompt token, a decoding row, a page read), or
    fitted to the recording of that name."""
    from astrai.observe.simulate import StepTime, fit, steps_of

    parts = text.split(",")
    if len(parts) == 4:
        try:
            values = [float(part) for part in parts]
        except ValueError:
            raise ValueError(f"step time {text!r}, expected four numbers of seconds") from None
        if min(values) < 0 or values[0] == 0:
            raise ValueError(f"step time {text!r}, expected no negative number, the first above 0")
        return StepTime(*values)
    if not Path(text).is_file():
        raise ValueError(f"step time {text!r}, expected four numbers or the file of a recording")
    fitted = fit(steps_of(Recording(Path(text))))
    print(fitted)
    return fitted.step_time


class Load(NamedTuple):
    """Where the requests come from: a file, or else a generator."""

    workload: Path | None
    n_requests: int
    rate: float
    shape: Shape
    seed: int

    def requests(self) -> Iterator[Request]:
        from astrai.observe.simulate import generated, read_workload

        if self.workload is not None:
            return read_workload(self.workload)
        return generated(self.n_requests, self.rate, self.shape, self.seed)


def simulate(load: Load, setting: Setting, step_time: StepTime, *, pools: bool) -> None:
    """Run the load, print what it came to, then the one JSON line."""
    from astrai.observe.simulate import Simulator

    report = Simulator(setting, step_time).run(_shown(load.requests()))
    print("\n".join(report.lines()))
    growth = _growth(load, setting, step_time) if pools else {}
    for n_pages, us in growth.items():
        print(f"  {n_pages:>9} pages: {us:7.1f} µs a tick")
    print(json.dumps({"simulate": report.record(), "host_us_per_tick_by_pages": growth}))


def setting_of(
    slots: int, pages: int, page_size: int, prefill_budget: int, static: bool, prefix_cache: bool,
    overlap: bool,
) -> Setting:  # fmt: skip
    from astrai.observe.simulate import Setting

    if pages < 1 or page_size < 1:
        raise ValueError(f"{pages = }, {page_size = }, expected at least 1")
    config = SchedulerConfig(
        max_slots=slots,
        prefill_budget=prefill_budget,
        group_decode="off",
        batching="static" if static else "continuous",
    )
    return Setting(config, pages, page_size, prefix_cache, int(overlap))


def _growth(load: Load, setting: Setting, step_time: StepTime) -> dict[int, float]:
    """Host µs a tick of the first requests, with pools of growing size."""
    from astrai.observe.simulate import Simulator

    print(f"host time of the first {_POOL_REQUESTS} requests, by the size of the pool:")
    found = {}
    for times in _POOLS:
        n_pages = setting.n_pages * times
        simulator = Simulator(setting._replace(n_pages=n_pages), step_time)
        report: Report = simulator.run(itertools.islice(load.requests(), _POOL_REQUESTS))
        found[n_pages] = round(report.host_us_per_tick, 2)
    return found


def _shown(requests: Iterable[Request]) -> Iterable[Request]:
    """With a bar on a terminal."""
    from tqdm import tqdm

    return tqdm(requests, unit=" requests", disable=None, leave=False)
