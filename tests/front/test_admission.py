from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrai.front.admission import Admission, QueueFull
from tests.mocks import make_task


class Hand:
    """A clock that somebody sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_free_slots_are_not_a_queue() -> None:
    """Requests that come faster than the loop ticks are not refused while slots are free."""
    admission = Admission(1, 1000, 4)
    for i in range(5):
        admission.enter(make_task(i, [1] * 10, 5))
    with pytest.raises(QueueFull, match="1 requests wait, at most 1 may"):
        admission.enter(make_task(5, [1], 5))
    for i in range(4):
        admission.admit(i)
    with pytest.raises(QueueFull, match="1 requests wait, at most 1 may"):
        admission.enter(make_task(6, [1], 5))
    admission.leave(2)
    admission.admit(4)
    admission.enter(make_task(7, [1], 5))


def test_prompt_tokens_are_bounded_too() -> None:
    admission = Admission(100, 50, 1)
    admission.enter(make_task(0, [1] * 10, 5))
    admission.admit(0)
    admission.enter(make_task(1, [1] * 80, 5))  # alone in the queue, or it could never be
    with pytest.raises(QueueFull, match="80 tokens wait, at most 50 may, and this one has 3"):
        admission.enter(make_task(2, [1] * 3, 5))
    admission.leave(1)
    admission.enter(make_task(2, [1] * 3, 5))
    assert (admission.n_waiting, admission.n_tokens) == (1, 3)


def test_the_time_to_come_back_is_what_the_queue_takes_at_its_pace() -> None:
    clock = Hand()
    admission = Admission(20, 1 << 20, 1, clock)
    assert admission.retry_after() == 1
    for i in range(21):
        admission.enter(make_task(i, [1], 5))
    for i in range(5):
        clock.now = 2.0 * i
        admission.admit(i)
        admission.leave(i)
    assert admission.retry_after() == 26  # 16 wait, 5 in 8 seconds went
    clock.now = 1e6
    assert admission.retry_after() == 600


@given(st.lists(st.tuples(st.sampled_from(("enter", "admit", "leave")), st.integers(0, 9))))
def test_whatever_comes_in_whatever_order_the_counts_return_to_zero(
    steps: list[tuple[str, int]],
) -> None:
    admission = Admission(3, 40, 2)
    inside: set[int] = set()
    for step, i in steps:
        if step == "enter" and i not in inside:
            try:
                admission.enter(make_task(i, [1] * (i + 1), 5))
            except QueueFull:
                continue
            inside.add(i)
        elif step == "admit":
            admission.admit(i)
        elif step == "leave":
            admission.leave(i)
            inside.discard(i)
        assert admission.n_waiting <= 3 + 2
    for i in inside:
        admission.leave(i)
    assert (admission.n_waiting, admission.n_tokens) == (0, 0)
