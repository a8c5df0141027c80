from __future__ import annotations

import threading
import time

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
