from __future__ import annotations

import json
import threading
import time

import pytest

from astrai.inference.engine import Engine, Message
from astrai.inference.task import Plan
from tests.mocks import Bench, MockLaunch, make_task, oracle


def threaded(bench: Bench, **options: float) -> Engine:
    engine = Engine(bench.scheduler, bench.runner, bench.deliver, **options)
    engine.start()
    return engine


def wait_for(done: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def test_the_loop_serves_messages_from_many_threads() -> None:
    bench = Bench(64, max_slots=4)
    engine = threaded(bench)

    def client(first: int) -> None:
        for i in range(first, first + 10):
            engine.post(Message(add=[make_task(i, [i, 1, 2], 6)]))

    threads = [threading.Thread(target=client, args=(10 * i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: len(bench.ends) == 50)
    engine.stop()
    assert all(bench.outputs[i] == oracle([i, 1, 2], 6, 0) for i in range(50))
    assert bench.books.counts.held == 0


def test_health_is_true_only_while_the_loop_steps_or_has_nothing_to_do() -> None:
    bench = Bench(64)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver, stall_seconds=0.05)
    assert not engine.health().ok and "not running" in engine.health().reason
    engine.start()
    wait_for(lambda: engine.health().ok)
    assert engine.health().reason == "nothing to do"
    held = threading.Event()
    launch = bench.runner.launch

    def slow(plan: Plan) -> MockLaunch:
        held.wait()
        return launch(plan)

    bench.runner.launch = slow  # type: ignore[method-assign]
    engine.post(Message(add=[make_task(0, [1], 2)]))
    wait_for(lambda: not engine.health().ok)
    assert "no tick for" in engine.health().reason
    held.set()
    wait_for(lambda: engine.health().ok and bench.ends == {0: "length"})
    counts = engine.health().numbers
    assert counts["pages_free"] + counts["pages_cached"] + counts["pages_held"] == 64
    engine.stop()


def test_a_tick_that_does_not_end_is_written_down_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(64)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver, stall_seconds=0.05)
    held = threading.Event()
    launch = bench.runner.launch

    def slow(plan: Plan) -> MockLaunch:
        held.wait()
        return launch(plan)

    bench.runner.launch = slow  # type: ignore[method-assign]
    engine.start()
    engine.post(Message(add=[make_task(7, [1, 2, 3], 2)]))
    wait_for(lambda: caplog.records)
    time.sleep(0.1)
    held.set()
    wait_for(lambda: bench.ends == {7: "length"})
    engine.stop()
    (record,) = caplog.records
    state = json.loads(record.getMessage().split(": ", 2)[2])
    assert "no tick for" in record.getMessage()
    assert state["running"][0]["id"] == 7 and state["running"][0]["pages"] == 1
    assert state["pages"]["held"] == 1 and state["n_waiting"] == 0


def test_a_queue_that_nobody_leaves_is_a_stall(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(64)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    engine.start()
    seat = bench.scheduler._why_not
    bench.scheduler._why_not = lambda *args: "pages"  # type: ignore[method-assign]
    engine.post(Message(add=[make_task(0, [1], 2)]))
    wait_for(lambda: not engine.health().ok)
    reason = engine.health().reason
    assert "1 requests wait, none runs and 64 pages are free" in reason
    wait_for(lambda: caplog.records)
    state = json.loads(caplog.records[0].getMessage().split(": ", 2)[2])
    assert state["blocked"] == "pages" and state["queue"][0]["request_id"] == "r0"
    bench.scheduler._why_not = seat  # type: ignore[method-assign]
    wait_for(lambda: bench.ends == {0: "length"} and engine.health().ok)
    engine.stop()
    assert len(caplog.records) == 1


def test_a_loop_that_ends_answers_everybody() -> None:
    bench = Bench(64)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)

    def broken(*args: object) -> Plan:
        raise RuntimeError("the books do not balance")

    bench.scheduler.tick = broken  # type: ignore[method-assign]
    tasks = [make_task(i, [1], 2) for i in range(3)]
    tasks[0].siblings = [tasks[1]]
    engine.start()
    engine.post(Message(add=[tasks[0]]))
    wait_for(lambda: engine.failure is not None and len(bench.ends) == 2)
    engine.stop()
    engine.post(Message(add=[tasks[2]]))
    assert bench.ends == {0: "error", 1: "error", 2: "error"}
    assert all("books do not balance" in (task.error or "") for task in tasks)
    assert not engine.health().ok and "books do not balance" in engine.health().reason


def test_stopping_ends_what_runs() -> None:
    bench = Bench(64)
    engine = threaded(bench)
    engine.post(Message(add=[make_task(0, [1], 100)]))
    wait_for(lambda: bench.outputs.get(0))
    engine.stop()
    assert bench.ends == {0: "error"} or bench.ends == {0: "length"}


def test_a_task_that_cannot_fit_is_answered_by_the_loop_too() -> None:
    bench = Bench(4, page_size=4)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    refused: list[object] = []
    bench.events.attach(
        lambda tick, kind, values: refused.append(values[0]) if kind == "refuse" else None
    )
    engine.post(Message(add=[make_task(0, [1], 100), make_task(1, [1], 3)]))
    while not engine.idle:
        engine.step()
    assert bench.ends == {0: "error", 1: "length"} and refused == ["r0"]
