"""What the settled collector relies on: an engine's ticks leave no cycles behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from astrai.inference.engine import Engine, Message
from astrai.inference.task import Task
from astrai.runtime import collector
from tests.mocks import Bench, make_task

FIRST = 1_000_000  # task ids of this test


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    gc.enable()


def test_what_is_loaded_is_walked_no_more() -> None:
    collector.settle()
    assert gc.get_freeze_count() > 1000
    assert gc.get_threshold()[0] > 10_000


@pytest.mark.parametrize("depth", [0, 1])
def test_ended_tasks_are_freed_without_a_walk(depth: int) -> None:
    bench = Bench(64, max_slots=4, depth=depth)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    gc.collect()
    gc.disable()
    for first in range(FIRST, FIRST + 120, 40):
        tasks = [make_task(first + i, [i, 1, 2] * 5, 6) for i in range(40)]
        engine.post(Message(add=tasks, abort=[first, first + 39]))
        del tasks
        while not engine.idle:
            engine.step()
    assert len(bench.ends) == 120
    tasks_found = [found.id for found in gc.get_objects() if type(found) is Task]
    left = [task for task in tasks_found if task >= FIRST]  # not those of other tests
    assert len(left) <= 4, left  # the last plan
