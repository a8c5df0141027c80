"""What the film shows is what the run did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astrai.inference.engine import Engine
from astrai.observe.animate.story import _Pages, cache_story, label, moments, occupied_mask
from tests.mocks import Bench, make_task

PAGE, N_PAGES, SLOTS = 64, 10, 5


def worked_example() -> list[tuple[int, str, tuple[Any, ...]]]:
    """A (120 tokens) and B (90); A grows in decode; C shares A's first page; A ends."""
    bench = Bench(N_PAGES, PAGE, SLOTS, prefill_budget=512, group_decode="position")
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    events: list[tuple[int, str, tuple[Any, ...]]] = []
    bench.events.attach(lambda *event: events.append(event))
    a = [i % 7 for i in range(120)]
    bench.scheduler.add(make_task(0, a, 60))
    bench.scheduler.add(make_task(1, [5] * 90, 30))
    for _ in range(12):
        engine.step()
    bench.scheduler.add(make_task(2, [*a[:64], *range(30)], 70))
    for i in range(3, 8):
        bench.scheduler.add(make_task(i, [i] * 24, 10))
    while not engine.idle:
        engine.step()
    return events


def test_the_steps_of_the_cache_are_the_worked_example() -> None:
    story = cache_story(worked_example(), N_PAGES)
    assert story.actors == [0, 1, 2]
    told = [(s.kind, label(s.actor), sorted(s.frames), s.table, s.positions) for s in story.steps]
    assert told[:4] == [
        ("alloc", "A", [0, 1], [0, 1], 120),
        ("alloc", "B", [2, 3], [2, 3], 90),
        ("grow", "A", [4], [0, 1, 4], 129),
        ("share", "C", [0], [0, 5], 94),
    ]
    assert story.steps[0].pool.free_mask == 0b1111111100
    assert story.steps[3].pool.refs[:6] == (2, 1, 1, 1, 1, 1)
    (end,) = [s for s in story.steps if s.kind == "end" and s.actor == 0]
    assert end.positions == 179
    assert end.pool.refs[0] == 1, "C holds the shared page still"
    assert end.pool.cached >= {1}, "a full page stays to be found"
    assert end.pool.free_mask >> 4 & 1, "the partial page's bit comes back"


def test_pages_of_a_task_that_failed_are_free_not_cached() -> None:
    pages = _Pages(4)
    for kind, values in (
        ("take", (0, [0, 1])), ("index", (0, [0])), ("forget", ([0],)), ("return", (0, [1, 0])),
    ):  # fmt: skip
        pages.read(kind, values)
    assert pages.state() == ((0, 0, 0, 0), frozenset())


def test_moments_follow_slots_queue_and_groups() -> None:
    told = moments(worked_example())
    first = told[0]
    assert (first.admitted, first.prefill) == ([0, 1], {0: 120, 1: 90})
    full = next(m for m in told if m.waiting)
    assert full.reason == "slots"
    assert occupied_mask(full.slots.values()) == 0b11111
    # Equal prompts admitted together stand at equal positions ever after.
    assert any([3, 4] in m.together for m in told)
    assert sorted(t for m in told for t in m.ended) == list(range(8))
    assert told[-1].slots == {}


def test_a_run_without_the_story_says_what_is_missing() -> None:
    events = [e for e in worked_example() if e[1] != "share"]
    with pytest.raises(ValueError, match="shared its prefix"):
        cache_story(events, N_PAGES)


def test_labels_go_on_after_the_alphabet() -> None:
    assert [label(i) for i in (0, 25, 26, 53)] == ["A", "Z", "A1", "B2"]


def test_the_bars_have_the_ratio_that_was_measured(tmp_path: Path) -> None:
    from astrai.observe.animate.render import measured

    result = tmp_path / "batching.json"
    result.write_text('Static 1.0x\n{"bench": "batching", "time_ratio": 1.71, "slots": 64}\n')
    assert measured(result) == (1.71, 64)
    for wrong in ("", "no JSON", '{"bench": "latency"}', '{"bench": "batching"}', "[]"):
        result.write_text(wrong)
        with pytest.raises(ValueError, match="not a result of astrai bench batching"):
            measured(result)
