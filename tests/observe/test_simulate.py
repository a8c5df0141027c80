from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.cli import app as cli
from astrai.config import SchedulerConfig
from astrai.inference.engine import Engine, Message
from astrai.inference.scheduler import Scheduler
from astrai.observe.recorder import Recorder
from astrai.observe.recording import Recording
from astrai.observe.simulate import (
    Request,
    Setting,
    Shape,
    SimulatedRunner,
    Simulator,
    Step,
    StepTime,
    fit,
    generated,
    read_workload,
    steps_of,
)
from astrai.observe.whatif import Change, what_if
from tests.mocks import Bench, make_task
from tests.observe.test_replay import mixed_run

STEP = StepTime(0.01, 0.001, 0.002, 0.0005)


def setting(slots: int = 4, n_pages: int = 100, depth: int = 0, **config: object) -> Setting:
    scheduler = SchedulerConfig(max_slots=slots, **config)  # type: ignore[arg-type]
    return Setting(scheduler, n_pages, 16, depth=depth)


def test_one_request_takes_what_the_formula_says() -> None:
    report = Simulator(setting(), StepTime(0.01, 0.001, 0.002, 0.0)).run([Request(5.0, 20, (4,))])
    assert report.ttft == pytest.approx([0.01 + 0.020] * 3)
    assert report.inter_token == pytest.approx([0.012] * 3)
    assert report.seconds == pytest.approx(5.0 + 0.03 + 3 * 0.012)
    assert (report.tokens_in, report.tokens_out, report.n_ticks) == (20, 4, 5)


def test_pages_read_cost_time() -> None:
    report = Simulator(setting(), StepTime(0.01, 0.0, 0.0, 1.0)).run([Request(0.0, 16, (3,))])
    assert report.seconds == pytest.approx(3 * 0.01 + 1 + 2 + 2)  # positions 16, 17, 18


def test_overlap_hides_nothing_of_the_device_and_launches_one_more() -> None:
    requests = [Request(0.0, 10, (5,)) for _ in range(3)]
    plain = Simulator(setting(), STEP).run(requests)
    overlapped = Simulator(setting(depth=1), STEP).run(requests)
    assert overlapped.tokens_out == plain.tokens_out == 15
    assert overlapped.seconds >= plain.seconds - 1e-9


def test_a_late_request_is_waited_for_and_counts_from_its_arrival() -> None:
    report = Simulator(setting(slots=1), STEP).run([Request(0.0, 8, (50,)), Request(0.1, 8, (2,))])
    assert report.ttft[-1] > 0.5  # it waits for the first
    assert report.waits["slots"] > 30


def test_shared_beginnings_are_found_and_own_parts_are_not() -> None:
    requests = [Request(float(i), 40, (2,), prefix=7, n_prefix=32) for i in range(5)]
    requests += [Request(10.0 + i, 40, (2,)) for i in range(5)]
    report = Simulator(setting(), STEP).run(requests)
    assert report.cached_tokens == 4 * 32


def test_a_request_that_cannot_fit_is_counted() -> None:
    report = Simulator(setting(n_pages=2), STEP).run([Request(0, 40, (2,)), Request(0, 8, (2,))])
    assert (report.n_refused, report.n_requests, report.tokens_out) == (1, 2, 2)


def test_a_small_pool_preempts_and_still_says_everything() -> None:
    requests = [Request(0.0, 20, (60,)) for _ in range(4)]
    report = Simulator(setting(n_pages=12), STEP).run(requests)
    assert report.n_preemptions > 0 and report.tokens_out == 240 and report.pages_held <= 12


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    slots=st.integers(1, 6),
    n_pages=st.integers(20, 60),
    depth=st.integers(0, 1),
)
def test_every_token_of_every_load_is_said(seed: int, slots: int, n_pages: int, depth: int) -> None:
    shape = Shape(prompt=30, output=10, prefixes=2, n_prefix=32, shared=0.5)
    requests = list(generated(40, 20.0, shape, seed))
    report = Simulator(setting(slots, n_pages, depth), STEP).run(requests)
    fits = [r for r in requests if -(-(r.n_prompt + r.outputs[0] - 1) // 16) <= n_pages]
    assert report.tokens_out == sum(r.outputs[0] for r in fits)
    assert report.n_refused == len(requests) - len(fits)
    assert list(report.ttft) == sorted(report.ttft)


def test_a_generated_load_is_what_was_asked_for() -> None:
    shape = Shape(prompt=100, output=50, shared=0.25, prefixes=3, n_prefix=64)
    requests = list(generated(4000, 10.0, shape, 0))
    assert requests == list(generated(4000, 10.0, shape, 0)) != list(generated(4000, 10, shape, 1))
    assert requests[-1].at == pytest.approx(400, rel=0.1)
    lengths = sorted(r.n_prompt - r.n_prefix for r in requests)
    assert lengths[2000] == pytest.approx(100, rel=0.1) and lengths[-1] <= 800
    assert sum(r.prefix >= 0 for r in requests) == pytest.approx(1000, rel=0.15)
    assert {r.prefix for r in requests} == {-1, 0, 1, 2}


def test_fit_finds_the_numbers_of_a_formula() -> None:
    rng = random.Random(0)
    steps = []
    for _ in range(500):
        work = (rng.randrange(200), rng.randrange(16), rng.randrange(100))
        steps.append(Step(*work, STEP.seconds(*work)))
    found = fit(steps)
    assert found.step_time == pytest.approx(STEP) and found.residual < 1e-9
    noisy = [s._replace(seconds=s.seconds * rng.uniform(0.98, 1.02)) for s in steps]
    assert fit(noisy).step_time == pytest.approx(STEP, rel=0.1)
    held_up = [s._replace(seconds=s.seconds + (i % 10 == 0)) for i, s in enumerate(noisy)]
    assert fit(held_up).step_time == pytest.approx(STEP, rel=0.1)
    assert fit(held_up).n_outliers == 50
    assert "500 steps" in str(found) and "1000.00 µs a prompt token" in str(found)


def test_no_work_takes_less_than_none() -> None:
    rng = random.Random(1)
    steps = []
    for _ in range(200):
        decode = rng.randrange(16)
        steps.append(Step(rng.randrange(50), decode, 5 * decode, 0.01 - 1e-5 * decode))
    assert min(fit(steps).step_time) >= 0.0
    with pytest.raises(ValueError, match=r"3 steps .* at least 8"):
        fit(steps[:3])


@pytest.mark.parametrize("depth", [0, 1])
def test_the_step_time_of_a_simulated_recording_is_found_again(tmp_path: Path, depth: int) -> None:
    """Record a run whose device is the formula: fitting it gives the formula back."""
    bench = Bench(200, page_size=16, max_slots=6, prefill_budget=64)
    runner = SimulatedRunner(STEP, 16, depth)
    scheduler = Scheduler(bench.scheduler.config, bench.books, runner.clock, bench.events)
    recorder = Recorder(tmp_path / "run.jsonl", scheduler, {"depth": depth})
    bench.events.attach(recorder)
    engine = Engine(scheduler, runner, lambda updates: None)
    rng = random.Random(0)
    for i in range(30):
        engine.post(Message(add=[make_task(i, [i] * rng.randint(1, 90), rng.randint(1, 40))]))
        for _ in range(rng.randint(0, 5)):
            engine.step()
    while not engine.idle:
        engine.step()
    recorder.close()
    found = fit(steps_of(Recording(tmp_path / "run.jsonl")))
    assert found.n_steps == runner.n_launches
    assert found.step_time == pytest.approx(STEP, rel=0.02) and found.n_outliers == 0


def test_a_workload_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    lines = [
        {"at": 0, "prompt": 10, "output": 3},
        {"at": 1.5, "prompt": [1, 2, 3], "output": 2, "priority": 1, "n": 2},
        {"at": 2, "prompt": 40, "output": 3, "prefix": "chat", "prefix_tokens": 32},
        {"at": 3, "prompt": 50, "output": 3, "prefix": "chat", "prefix_tokens": 32},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    requests = list(read_workload(path))
    assert requests[1].outputs == (2, 2) and list(requests[1].prompt or ()) == [1, 2, 3]
    assert requests[2].prefix == requests[3].prefix != requests[0].prefix
    assert Simulator(setting(), STEP).run(requests).cached_tokens == 32


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: a list, expected an object"),
        ('{"prompt": 3}', "line 2: 'output' is missing"),
        ('{"prompt": 3, "output": 2, "x": 1}', "line 2: unknown field 'x', known are at, n"),
        ('{"prompt": 0, "output": 2}', "n_prompt = 0"),
        ('{"prompt": 5, "output": 2, "prefix_tokens": 6}', "prefix_tokens = 6"),
        ('{"prompt": 5, "output": 2, "at": 0.5}', "at = 0.5, expected at least 1.0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text('{"at": 1, "prompt": 1, "output": 1}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        list(read_workload(path))
    assert says in str(caught.value) and "load.jsonl, line 2: " in str(caught.value)


def test_what_if_gives_the_recorded_load_to_another_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    bench = mixed_run(path, 8)
    found = what_if(Recording(path), Change(n_pages=64, max_slots=8))
    said = sum(len(tokens) for tokens in bench.outputs.values())
    assert found.measured.tokens_out == found.recorded.tokens_out == said
    assert found.other.tokens_out == said and found.other.n_preemptions == 0
    assert found.measured.n_preemptions == bench.scheduler.n_preemptions > 0
    assert found.recorded.n_preemptions > 0
    assert found.measured.n_ticks == bench.scheduler.n_tick
    table = "\n".join(found.lines())
    assert "measured" in table and "preemptions" in table and "seconds" in table
    static = what_if(Recording(path), Change(batching="static", ignore_priority=True))
    assert static.other.n_ticks > static.recorded.n_ticks
    off = what_if(Recording(path), Change(prefix_cache=False))
    assert off.other.cached_tokens < off.recorded.cached_tokens
    with pytest.raises(ValueError, match="page_size = 6, expected a multiple of 4"):
        what_if(Recording(path), Change(page_size=6))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    mixed_run(path, 8)
    assert cli.run(["replay", str(path)]) == 0
    assert "all as recorded" in capsys.readouterr().out
    assert cli.run(["replay", str(path), "--slots", "6", "--policy", "static"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record) == {"measured", "simulated", "what_if", "step_time"}
    assert cli.run(["trace", str(path), "-o", str(tmp_path / "t.json"), "--ticks", "3:9"]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    load = ["simulate", "--requests", "50", "--slots", "4", "--no-pools"]
    for step_time in (str(path), "0.01,0,0.001,0"):
        assert cli.run([*load, "--step-time", step_time]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["simulate"]["n_requests"] == 50
    assert cli.run([*load, "--step-time", "1,2"]) == 1
    assert "expected four numbers or the file" in capsys.readouterr().err
    lines = path.read_text().splitlines()
    lines[40] = lines[41]
    path.write_text("\n".join(lines) + "\n")
    assert cli.run(["replay", str(path)]) == 1


def test_the_same_load_gives_the_same_report() -> None:
    load = list(generated(200, 5.0, Shape(prompt=30, output=20), 3))
    first, second = (Simulator(setting(), STEP).run(load) for _ in range(2))
    assert first._replace(host_seconds=0.0) == second._replace(host_seconds=0.0)
