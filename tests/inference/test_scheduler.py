from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.engine import Engine, Message
from astrai.inference.task import Task
from tests.mocks import VOCAB, Bench, SlowGrammars, make_task, oracle


def engine_of(bench: Bench) -> Engine:
    return Engine(bench.scheduler, bench.runner, bench.deliver)


def run(bench: Bench, tasks: list[Task], max_ticks: int = 100_000) -> Engine:
    engine = engine_of(bench)
    engine.post(Message(add=tasks))
    for _ in range(max_ticks):
        if engine.idle:
            break
        engine.step()
        bench.scheduler.check()
    assert engine.idle, "the loop did not finish"
    return engine


def random_tasks(n: int, seed: int, max_prompt: int = 40, max_output: int = 40) -> list[Task]:
    rng = random.Random(seed)
    return [
        make_task(
            i,
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, max_prompt))],
            rng.randint(1, max_output),
            seed=rng.randrange(3),
            stop_ids=frozenset({5}),
        )
        for i in range(n)
    ]


def expected(task: Task) -> list[int]:
    return oracle(task.tokens[: task.n_prompt], task.max_tokens, task.seed, task.stop_ids)


def test_the_scheduler_and_the_books_import_no_torch() -> None:
    code = (
        "import sys, astrai.config, astrai.inference.engine, astrai.inference.events;"
        "from astrai.inference.cache import books;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("n_pages", [20, 24, 1000])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_request_gets_the_tokens_it_would_get_alone(
    depth: int, n_pages: int, prefix_cache: bool
) -> None:
    bench = Bench(n_pages, max_slots=6, depth=depth, prefix_cache=prefix_cache)
    tasks = random_tasks(40, seed=n_pages)
    run(bench, tasks)
    for task in tasks:
        assert bench.outputs[task.id] == expected(task)
        assert bench.ends[task.id] == ("stop" if 5 in bench.outputs[task.id] else "length")
    assert bench.books.counts.held == 0
    assert len(bench.scheduler.free_slots) == 6
    if n_pages == 20:
        assert bench.scheduler.n_preemptions > 0, "the small pool was meant to be too small"
    bench.books.drop_cached()
    assert bench.books.counts.free == n_pages


def test_a_prompt_is_computed_in_chunks_under_the_budget() -> None:
    bench = Bench(100, prefill_budget=8)
    seen: list[tuple[int, int]] = []
    bench.events.attach(
        lambda tick, kind, values: seen.append((tick, values[2])) if kind == "prefill" else None
    )
    run(bench, [make_task(0, range(20), 2), make_task(1, range(30, 35), 2)])
    assert [count for _, count in seen] == [8, 8, 4, 4, 1]
    per_tick: dict[int, int] = {}
    for tick, count in seen:
        per_tick[tick] = per_tick.get(tick, 0) + count
    assert max(per_tick.values()) == 8
    assert bench.outputs[0] == oracle(range(20), 2, 0)


def test_a_running_task_decodes_while_a_long_prompt_is_prefilled() -> None:
    bench = Bench(200, prefill_budget=4)
    engine = engine_of(bench)
    engine.post(Message(add=[make_task(0, [1], 30)]))
    engine.step()
    engine.post(Message(add=[make_task(1, range(64), 1)]))
    before = 0
    for _ in range(10):
        engine.step()
        n = len(bench.outputs.get(0, []))
        assert n == before + 1, "the decode step was held up"
        before = n


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    bench = Bench(4, page_size=4)
    with pytest.raises(ValueError, match=r"needs 5 pages of 4 .*prompt 10 \+ max_tokens 8.* has 4"):
        bench.scheduler.add(make_task(0, range(10), 8))
    bench.scheduler.add(make_task(1, range(10), 7))
    assert bench.scheduler.n_waiting == 1


def test_prefix_pages_are_shared_and_found_after_their_holder_ended() -> None:
    bench = Bench(50, page_size=4, prefill_budget=100)
    prompt = list(range(18))
    run(bench, [make_task(0, prompt, 3)])
    assert bench.books.counts == (45, 5, 0, 50)  # 18 + 2 computed positions fill 5 pages of 4
    again = [
        make_task(1, prompt, 3),
        make_task(2, [*prompt, 7, 7], 3),
        make_task(3, prompt[:16], 3),
    ]
    run(bench, again)
    assert [task.n_cached for task in again] == [
        16,
        16,
        12,
    ]  # the last prompt token is always computed
    assert bench.outputs[1] == bench.outputs[0] == oracle(prompt, 3, 0)
    other = make_task(4, prompt, 3, namespace="another tenant")
    run(bench, [other])
    assert other.n_cached == 0 and bench.outputs[4] == bench.outputs[0]


def test_least_recently_used_pages_are_evicted_first() -> None:
    bench = Bench(8, page_size=4, prefill_budget=100)
    run(bench, [make_task(0, [1] * 8, 1)])
    run(bench, [make_task(1, [2] * 8, 1)])
    run(bench, [make_task(2, [1] * 9, 1)])  # uses the first chain again
    assert bench.books.counts.cached == 4
    run(
        bench, [make_task(3, range(40, 60), 1)]
    )  # needs 5 pages: evicts one, the end of the chain of 2s
    probe = [make_task(4, [2] * 9, 1), make_task(5, [1] * 9, 1)]
    run(bench, [probe[1]])
    assert probe[1].n_cached == 8
    run(bench, [probe[0]])
    assert probe[0].n_cached in (0, 4)


def test_growth_evicts_cached_pages_before_it_preempts() -> None:
    bench = Bench(8, page_size=4, prefill_budget=100)
    run(bench, [make_task(0, range(16), 1)])
    assert bench.books.counts == (4, 4, 0, 8)
    run(bench, [make_task(1, range(50, 54), 12), make_task(2, range(60, 64), 12)])
    assert bench.scheduler.n_preemptions == 0 and bench.books.counts.total == 8


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    bench = Bench(8, page_size=4, prefill_budget=100)
    tasks = [make_task(i, range(10 * i, 10 * i + 4), 20) for i in range(3)]
    victims: list[object] = []
    bench.events.attach(
        lambda tick, kind, values: victims.append(values[0]) if kind == "preempt" else None
    )
    run(bench, tasks)
    assert victims and 0 not in victims and victims[0] == 2
    assert tasks[0].n_preempted == 0
    assert tasks[0].ended_at is not None and tasks[2].ended_at is not None
    assert tasks[0].ended_at < tasks[2].ended_at


def test_a_newcomer_waits_for_prefill_budget_without_holding_pages() -> None:
    bench = Bench(40, page_size=4, prefill_budget=8)
    tasks = [make_task(0, range(24), 2), make_task(1, range(30, 38), 2)]
    engine = engine_of(bench)
    engine.post(Message(add=tasks))
    engine.step()
    assert tasks[0].slot >= 0 and tasks[1].slot < 0 and tasks[1].page_table == []
    assert bench.scheduler.blocked == "prefill"
    while not engine.idle:
        engine.step()
    assert tasks[1].waits == {"prefill": 3}


def test_pages_of_a_failed_task_are_cleared_before_they_are_used_again() -> None:
    bench = Bench(4, page_size=4, prefill_budget=100)
    bench.runner.nan_on = {0}
    run(bench, [make_task(0, range(10), 3)])
    assert bench.runner.frames[0] == [0, 1, 2, 3], "nothing was launched since"
    run(bench, [make_task(1, [7], 2)])
    assert bench.runner.frames[1:3] == [[-1] * 4] * 2 and bench.runner.frames[0][0] == 7


def test_pages_of_a_failed_task_that_others_will_find_are_not_cleared() -> None:
    bench = Bench(40, page_size=4, prefill_budget=100)
    prompt = list(range(14))
    run(bench, [make_task(0, prompt, 1)])
    bench.runner.nan_on = {1}
    run(bench, [make_task(1, [*prompt[:8], 50, 51], 3)])  # holds the first two of three pages
    again = make_task(2, prompt, 3)
    run(bench, [again])
    assert bench.ends[1] == "error" and again.n_cached == 12
    assert bench.outputs[2] == oracle(prompt, 3, 0)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("budget", [3, 8])
def test_a_preempted_prompt_is_scored_once(depth: int, budget: int) -> None:
    bench = Bench(6, max_slots=2, depth=depth, prefix_cache=False, prefill_budget=budget)
    params = SamplingParams(max_tokens=8, prompt_logprobs=0)
    scored = make_task(1, range(8), 8, params=params)
    run(bench, [make_task(0, range(10, 18), 8), scored])
    assert scored.n_preempted
    assert [score.token for score in scored.prompt_logprobs] == list(range(1, 8))


@pytest.mark.parametrize("prompt_length", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_share_the_prompt_and_copy_the_partial_page(
    prompt_length: int, prefix_cache: bool
) -> None:
    bench = Bench(60, page_size=4, max_slots=3, prefix_cache=prefix_cache)
    copies: list[tuple[object, ...]] = []
    bench.events.attach(
        lambda tick, kind, values: copies.append(values) if kind == "copy" else None
    )
    prompt = list(range(prompt_length))
    tasks = [make_task(i, prompt, 12, seed=i, index=i) for i in range(3)]
    tasks[0].siblings = tasks[1:]
    run(bench, [tasks[0]])
    for task in tasks:
        assert bench.outputs[task.id] == oracle(prompt, 12, task.id)
        assert task.id == 0 or task.n_cached == prompt_length - 1
    assert len(copies) == (2 if (prompt_length - 1) % 4 else 0)
    assert bench.books.counts.held == 0


def test_waits_have_a_written_reason() -> None:
    bench = Bench(40, page_size=4, max_slots=1, prefill_budget=100)
    tasks = [make_task(0, [1, 2], 5), make_task(1, [3, 4], 5)]
    reasons: list[object] = []
    bench.events.attach(
        lambda tick, kind, values: reasons.append(values[0]) if kind == "wait" else None
    )
    run(bench, tasks)
    assert tasks[0].waits == {} and tasks[1].waits == {"slots": 5}
    assert reasons == ["slots"]
    small = Bench(5, page_size=4, max_slots=4, prefill_budget=100)
    tasks = [make_task(0, range(12), 5), make_task(1, range(50, 62), 5)]
    run(small, tasks)
    assert tasks[1].waits == {"pages": 5}


def test_priority_goes_first_and_ageing_keeps_the_rest_alive() -> None:
    bench = Bench(40, max_slots=1, ageing_ticks=10)
    order: list[int] = []
    bench.events.attach(
        lambda tick, kind, values: order.append(values[0]) if kind == "admit" else None
    )
    engine = engine_of(bench)
    engine.post(
        Message(add=[make_task(0, [1], 3), make_task(1, [2], 3, priority=1), make_task(2, [3], 3)])
    )
    for i in range(3, 30):  # a stream of urgent tasks, one for each slot turn
        for _ in range(3):
            engine.step()
        engine.post(Message(add=[make_task(i, [4], 3)]))
    while not engine.idle:
        engine.step()
    assert order[:2] == [0, 2]
    assert order.index(1) < 8, "the aged task was starved"


def test_abort_frees_everything_within_a_tick() -> None:
    bench = Bench(40)
    engine = engine_of(bench)
    engine.post(Message(add=[make_task(i, range(10), 20) for i in range(8)]))
    for _ in range(6):
        engine.step()
    assert bench.books.counts.held > 0
    engine.post(Message(abort=list(range(8))))
    engine.step()
    assert bench.books.counts.held == 0 and len(bench.scheduler.free_slots) == 4
    assert set(bench.ends.values()) == {"abort"} and bench.scheduler.idle
    bench.scheduler.check()


def test_an_aborted_task_leaves_only_pages_whose_launch_was_read() -> None:
    bench = Bench(40, page_size=4, prefill_budget=8, depth=1)
    engine = engine_of(bench)
    engine.post(Message(add=[make_task(0, range(30), 2)]))
    for _ in range(3):
        engine.step()  # three chunks of 8 are launched, one is read
    engine.post(Message(abort=[0]))
    engine.step()
    assert bench.ends == {0: "abort"} and bench.books.counts == (36, 4, 0, 40)


def test_one_bad_request_ends_alone() -> None:
    bench = Bench(100, max_slots=4)
    tasks = random_tasks(6, seed=1, max_output=10)
    bench.runner.fail_on = {1}
    bench.runner.nan_on = {2}

    def broken(token: int) -> str | None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "mock")

    tasks[3].stop_check = broken
    tasks[3].stop_ids = frozenset()
    run(bench, tasks)
    assert [bench.ends[i] for i in (1, 2, 3)] == ["error"] * 3
    assert "mock failure for task 1" in (tasks[1].error or "")
    assert "not finite" in (tasks[2].error or "") and "UnicodeDecodeError" in (tasks[3].error or "")
    for i in (0, 4, 5):
        assert bench.outputs[i] == expected(tasks[i])
    bench.books.drop_cached()
    assert bench.books.counts.free == 100


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_launch_that_fails_costs_the_others_no_token(depth: int) -> None:
    bench = Bench(100, depth=depth)
    tasks = [make_task(i, [i, 2, 3], 12) for i in range(4)]
    engine = engine_of(bench)
    engine.post(Message(add=tasks))
    for _ in range(5):
        engine.step()
    bench.runner.fail_on = {1}
    while not engine.idle:
        engine.step()
        bench.scheduler.check()
    assert bench.ends[1] == "error"
    assert all(bench.outputs[i] == oracle([i, 2, 3], 12, 0) for i in (0, 2, 3))


def test_pages_of_a_failed_task_are_not_found_again() -> None:
    bench = Bench(40, page_size=4, prefill_budget=100)
    engine = engine_of(bench)
    engine.post(Message(add=[make_task(0, range(12), 20)]))
    for _ in range(6):
        engine.step()
    bench.runner.nan_on = {0}
    engine.step()
    engine.step()
    assert bench.ends == {0: "error"} and bench.books.counts == (40, 0, 0, 40)


def test_stop_strings_end_the_task_in_the_same_tick() -> None:
    bench = Bench(40)
    task = make_task(0, [1, 2, 3], 30)
    seen: list[int] = []

    def stop_check(token: int) -> str | None:
        seen.append(token)
        return "END" if len(seen) == 4 else None

    task.stop_check = stop_check
    run(bench, [task])
    assert bench.ends[0] == "stop" and task.stop_reason == "END"
    assert bench.outputs[0] == seen == oracle([1, 2, 3], 4, 0)


def test_min_tokens_holds_off_stop_ids() -> None:
    prompt = [3]
    first = oracle(prompt, 5, 0)
    bench = Bench(40)
    params = SamplingParams(max_tokens=5, min_tokens=2)
    run(bench, [make_task(0, prompt, 5, stop_ids=frozenset(first[:3]), params=params)])
    assert (
        len(bench.outputs[0]) == 3
    )  # the mock does not ban, so the third is the first that may stop


def test_static_batching_refills_only_an_empty_batch() -> None:
    outputs = [1, 9, 2, 3, 8, 1]
    tasks = [make_task(i, [i, 1], n) for i, n in enumerate(outputs)]
    waits: list[object] = []
    static, continuous = Bench(100, max_slots=2, batching="static"), Bench(100, max_slots=2)
    static.events.attach(
        lambda tick, kind, values: waits.append(values[0]) if kind == "wait" else None
    )
    run(static, tasks)
    assert waits == ["slots"]
    copies = [make_task(i, [i, 1], n) for i, n in enumerate(outputs)]
    run(continuous, copies)
    assert static.outputs == continuous.outputs
    assert static.runner.n_launches == 9 + 3 + 8
    assert continuous.runner.n_launches < static.runner.n_launches


def test_decode_groups() -> None:
    for kind, sizes in (("position", [2, 1, 1]), ("length", [4]), ("off", [1, 1, 1, 1])):
        assert first_groups(kind, [1, 1, 2, 4]) == sizes


def test_grouping_by_length_pads_only_as_far_as_it_pays() -> None:
    # 4 positions a page, with the one being decoded: 20, 19, 2, 1 pages; then 35, 20, 19, 1.
    assert first_groups("length", [79, 75, 7, 3]) == [2, 2]
    assert first_groups("length", [139, 79, 75, 3]) == [2, 1, 1]


def first_groups(kind: str, prompts: list[int]) -> list[int]:
    """Sizes of the groups of the first tick in which all tasks decode."""
    bench = Bench(100, page_size=4, prefill_budget=400, group_decode=kind)
    seen: list[list[int]] = []
    bench.events.attach(
        lambda tick, kind, values: seen.append(values[0]) if kind == "groups" else None
    )
    run(bench, [make_task(i, [i] * n, 2) for i, n in enumerate(prompts)])
    return sorted(seen[0], reverse=True)


class Script(RuleBasedStateMachine):
    """Random scripts of add, abort, failures and steps on a pool too small, with results late."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(12, page_size=4, max_slots=3, prefill_budget=6, depth=1)
        self.engine = engine_of(self.bench)
        self.engine.grammars = SlowGrammars(0)  # type: ignore[assignment]
        self.tasks: dict[int, Task] = {}
        self.prompts: dict[int, list[int]] = {}
        self.aborted: set[int] = set()

    @rule(
        base=st.integers(0, 2),
        n_prompt=st.integers(1, 20),
        n_output=st.integers(1, 20),
        choices=st.integers(1, 3),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "t"]),
        structured=st.sampled_from([None, None, StructuredOutput(regex="a")]),
    )
    def add(
        self,
        base: int,
        n_prompt: int,
        n_output: int,
        choices: int,
        priority: int,
        tenant: str,
        structured: StructuredOutput | None,
    ) -> None:
        prompt = [base] * 7 + list(range(n_prompt))
        first = len(self.tasks)
        params = SamplingParams(max_tokens=n_output, structured=structured)
        options: dict[str, Any] = {"namespace": tenant, "priority": priority, "params": params}
        tasks = [
            make_task(first + i, prompt, n_output, seed=i, index=i, **options)
            for i in range(choices)
        ]
        tasks[0].siblings = tasks[1:]
        for task in tasks:
            self.tasks[task.id], self.prompts[task.id] = task, prompt
        self.engine.post(Message(add=[tasks[0]]))

    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick: int) -> None:
        if self.tasks:
            task_id = pick % len(self.tasks)
            self.aborted.add(task_id)
            self.engine.post(Message(abort=[task_id]))

    @rule(pick=st.integers(0, 10**6), launch=st.booleans())
    def break_one(self, pick: int, launch: bool) -> None:
        """From now on its row has no token, or every launch with it fails."""
        if self.tasks:
            runner = self.bench.runner
            (runner.fail_on if launch else runner.nan_on).add(pick % len(self.tasks))

    @rule(n=st.integers(1, 12))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()
            self.balance()

    @invariant()
    def balance(self) -> None:
        self.bench.scheduler.check()

    def teardown(self) -> None:
        for _ in range(20_000):
            if self.engine.idle:
                break
            self.engine.step()
            self.balance()
        assert self.engine.idle
        for task_id, task in self.tasks.items():
            want = oracle(self.prompts[task_id], task.max_tokens, task.seed)
            got = self.bench.outputs.get(task_id, [])
            broken = self.bench.runner.fail_on | self.bench.runner.nan_on
            refused = task.error == "grammar: refused"
            if task_id in self.aborted | broken or refused:
                assert got == want[: len(got)]
            else:
                assert got == want and self.bench.ends[task_id] == "length"
        assert self.bench.books.counts.held == 0
        self.bench.books.drop_cached()
        assert self.bench.books.counts == (12, 0, 0, 12)
        assert self.bench.scheduler.free_slots.to_int() == 0b111


Script.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestScript = Script.TestCase


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(16, 40),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(0, 2),
)
def test_any_pool_any_width_any_budget_gives_the_same_tokens(
    seed: int, n_pages: int, slots: int, budget: int, depth: int
) -> None:
    bench = Bench(n_pages, page_size=5, max_slots=slots, prefill_budget=budget, depth=depth)
    tasks = random_tasks(12, seed, max_prompt=30, max_output=30)
    run(bench, tasks)
    assert bench.outputs == {task.id: expected(task) for task in tasks}


def test_a_clock_that_jumps_changes_no_decision() -> None:
    def decisions(clock: Callable[[], float]) -> list[tuple[int, str, object]]:
        bench = Bench(20, max_slots=6)
        bench.scheduler.clock = clock
        seen: list[tuple[int, str, object]] = []
        timeless = {"take", "share", "evict", "return", "prefill", "decode", "preempt", "wait"}
        bench.events.attach(lambda t, kind, v: seen.append((t, kind, v)) if kind in timeless else 0)
        tasks = random_tasks(40, seed=3)
        run(bench, tasks)
        assert all(bench.outputs[task.id] == expected(task) for task in tasks)
        return seen

    rng = random.Random(0)
    assert decisions(lambda: rng.uniform(-1e6, 1e6)) == decisions(lambda: 0.0)
