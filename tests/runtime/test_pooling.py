"""Tasks that sample nothing: a pooled hidden state, or the scores of the prompt."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.front.sampling_params import SamplingParams
from astrai.inference.engine import Engine, Message
from astrai.inference.task import Task
from tests.mocks import Bench, make_task, next_token

MEAN = SamplingParams(max_tokens=0, pooling="mean")
LAST = SamplingParams(max_tokens=0, pooling="last")


def run(bench: Bench, tasks: list[Task]) -> None:
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    engine.post(Message(add=tasks))
    while not engine.idle:
        engine.step()
        bench.scheduler.check()
    assert bench.books.counts.held == 0


def result(task: Task) -> float:
    return sum(part[0] for part in task.pooled)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    n_pages=st.integers(8, 16),
    budget=st.integers(1, 9),
    depth=st.integers(0, 1),
)
def test_pooled_states_survive_chunks_preemption_and_hits(
    seed: int, n_pages: int, budget: int, depth: int
) -> None:
    rng = random.Random(seed)
    bench = Bench(n_pages, prefill_budget=budget, depth=depth)
    start = [rng.randrange(97) for _ in range(12)]
    tasks = []
    for i in range(8):
        prompt = start[: rng.randrange(13)] + [rng.randrange(97) for _ in range(1 + i)]
        params = rng.choice([MEAN, LAST, None])
        n = rng.randint(1, 12) if params is None else 0
        tasks.append(make_task(i, prompt, n, params=params))
    run(bench, tasks)
    for task in tasks:
        assert bench.ends[task.id] == "length"
        if task.params.pooling == "mean":
            assert result(task) == sum(task.prompt)
            assert task.n_cached == 0
        elif task.params.pooling == "last":
            assert len(task.pooled) == 1
            assert result(task) == next_token(task.prompt, 0)
        assert (not bench.outputs[task.id]) == (task.max_tokens == 0)


def test_the_last_state_takes_a_prefix_hit_and_the_mean_does_not() -> None:
    bench = Bench(16)
    prompt = list(range(13))
    tasks = [make_task(0, prompt, 1), make_task(1, prompt, 0, params=LAST)]
    tasks.append(make_task(2, prompt, 0, params=MEAN))
    for task in tasks:
        run(bench, [task])
    assert [task.n_cached for task in tasks] == [0, 12, 0]
    times = tasks[2].timings()
    assert times.prefill is not None and times.prefill > 0 and times.decode is None


def test_several_choices_of_nothing_end() -> None:
    bench = Bench(16)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    leader, other = (make_task(i, [1, 2, 3], 0, params=params, index=i) for i in range(2))
    leader.siblings = [other]
    run(bench, [leader])
    assert bench.ends == {0: "length", 1: "length"}


def test_a_failed_row_ends_only_itself() -> None:
    bench = Bench(16)
    bench.runner.fail_on = {0}
    tasks = [make_task(i, [1, 2, 3], 0, params=MEAN) for i in range(2)]
    run(bench, tasks)
    assert bench.ends == {0: "error", 1: "length"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"pooling": "mean"}, "max_tokens = 16, expected 0"),
        ({"pooling": "max", "max_tokens": 0}, "'mean' or 'last'"),
        ({"pooling": "mean", "max_tokens": 0, "n": 2}, "n = 2, expected 1"),
        ({"pooling": "mean", "max_tokens": 0, "prompt_logprobs": 1}, "prompt_logprobs = 1"),
    ],
)
def test_what_cannot_be_pooled_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**fields)  # type: ignore[arg-type]
