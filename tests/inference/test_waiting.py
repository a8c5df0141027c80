from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from astrai.inference.task import Task
from astrai.inference.waiting import WaitingQueue
from tests.mocks import make_task


def queued(number: int, age: int) -> Task:
    task = make_task(number, [1], 1)
    task.key = (age, number, 0)
    return task


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9))))
def test_the_head_is_the_least_of_those_that_wait(script: list[tuple[int, int]]) -> None:
    queue = WaitingQueue()
    model: list[Task] = []
    for number, (what, value) in enumerate(script):
        if what < 2 or not model:
            task = queued(number, value)
            queue.push(task)
            model.append(task)
        else:
            task = model.pop(value % len(model))
            queue.remove(task)
            queue.remove(task)
        model.sort(key=lambda task: task.key)
        assert queue.in_order() == model and len(queue) == len(model)
        assert queue.head is (model[0] if model else None)


def test_the_head_may_come_back() -> None:
    queue = WaitingQueue()
    first, second = queued(0, 0), queued(1, 0)
    queue.push(second)
    queue.push(first)
    queue.remove(first)
    queue.push(first)
    queue.remove(first)
    assert queue.head is second
    queue.push(first)
    assert queue.head is first and queue.in_order() == [first, second]


def test_what_was_abandoned_behind_a_blocked_head_is_let_go() -> None:
    queue = WaitingQueue()
    queue.push(queued(0, 0))
    for number in range(1, 1000):
        queue.push(task := queued(number, 1))
        queue.remove(task)
    assert len(queue._heap) <= 3
