from __future__ import annotations

import random

import pytest

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.engine import Engine, Message
from astrai.inference.task import Task
from astrai.observe.ticks import Ticks
from astrai.observe.why import WhyReader
from tests.mocks import Bench, SlowGrammars, make_task


def watched(reader: WhyReader | None = None, **config: object) -> tuple[Bench, Engine, WhyReader]:
    bench = Bench(**config)  # type: ignore[arg-type]
    reader = reader or WhyReader()
    bench.events.attach(Ticks(reader.apply))
    return bench, Engine(bench.scheduler, bench.runner, bench.deliver), reader


def story(reader: WhyReader, request_id: str, choice: int = 0) -> dict[str, object]:
    why = reader.why(request_id)
    assert why is not None
    found: dict[str, object] = why.data["choices"][choice]
    return found


def waits(data: dict[str, object]) -> dict[str, int]:
    return {wait["reason"]: wait["ticks"] for wait in data["waits"]}  # type: ignore[attr-defined]


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def counted_now(bench: Bench, task: Task) -> dict[str, int]:
    """What the scheduler would write if the task left the queue now."""
    waited = dict(task.waits)
    for reason, mark in task.wait_mark.items():
        if ticks := bench.scheduler.wait_ticks[reason] - mark:
            waited[reason] = waited.get(reason, 0) + ticks
    return waited


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_waits_are_those_that_the_scheduler_counts_at_every_tick(depth: int, seed: int) -> None:
    bench, engine, reader = watched(n_pages=12, max_slots=3, depth=depth)
    rng = random.Random(seed)
    engine.grammars = SlowGrammars(seed)  # type: ignore[assignment]
    tasks: list[Task] = []
    for i in range(40):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        n = rng.choice((1, 1, 3))
        gated = StructuredOutput(regex="a") if rng.random() < 0.2 else None
        params = SamplingParams(max_tokens=20, structured=gated)
        choices = [
            make_task(100 * i + k, prompt, rng.randrange(1, 20), seed=k, index=k, params=params)
            for k in range(n)
        ]
        for choice in choices:
            choice.request_id = f"r{i}"
        choices[0].siblings = choices[1:]
        tasks += choices
        engine.post(Message(add=[choices[0]]))
        if rng.random() < 0.2:
            engine.post(Message(abort=[rng.choice(tasks).id]))
        for _ in range(rng.randrange(4)):
            engine.step()
            for task in tasks:
                data = story(reader, task.request_id, task.index)
                assert waits(data) == counted_now(bench, task), (task.id, data)
    run(engine)
    assert sum(task.n_preempted for task in tasks) > 0
    assert sum(task.waits.get("grammar", 0) for task in tasks) > 0
    for task in tasks:
        data = story(reader, task.request_id, task.index)
        assert data["state"] == "ended"
        assert data["finish_reason"] == task.finish_reason
        assert data["n_output"] == task.n_output
        assert data["preempted"] == task.n_preempted
        assert waits(data) == task.waits
    assert not reader._held and not reader._queued and not reader._marks and not reader._live


def test_who_held_the_pages_and_slots_is_named() -> None:
    _bench, engine, reader = watched(n_pages=7, max_slots=2)
    engine.post(Message(add=[make_task(7, range(8), 20), make_task(9, range(50, 58), 4)]))
    engine.step()
    engine.post(Message(add=[make_task(11, range(80, 92), 2)]))
    engine.step()
    now = reader.why("r11")
    assert now is not None
    assert now.text.startswith("has waited 1 tick: 1 for a slot (held by 7, 9)")
    run(engine)
    data = story(reader, "r11")
    held = {wait["reason"]: wait["held_by"] for wait in data["waits"]}  # type: ignore[attr-defined]
    assert held["slots"] == [{"task": 7, "request_id": "r7"}, {"task": 9, "request_id": "r9"}]
    assert held["pages"] == [{"task": 7, "request_id": "r7"}]
    told = reader.why("r11")
    assert told is not None
    for piece in ("for a slot (held by 7, 9)", "for pages (held by 7)", "chunks; queued"):
        assert piece in told.text


def test_who_came_after_the_first_holders_is_named_too() -> None:
    _bench, engine, reader = watched(n_pages=64, max_slots=1)
    engine.post(Message(add=[make_task(i, [i, 2, 3], 3) for i in (4, 5, 6)]))
    run(engine)
    (wait,) = story(reader, "r6")["waits"]  # type: ignore[misc, attr-defined]
    assert [holder["task"] for holder in wait["held_by"]] == [4, 5]  # type: ignore[index]


def test_a_preemption_names_who_took_the_pages() -> None:
    _bench, engine, reader = watched(n_pages=6, max_slots=2)
    engine.post(Message(add=[make_task(1, range(8), 16), make_task(2, range(20, 28), 12)]))
    run(engine)
    why = reader.why("r2")
    assert why is not None
    assert "preempted once by 1" in why.text
    assert why.data["choices"][0]["preemptions"][0]["by"] == {"task": 1, "request_id": "r1"}
    assert waits(why.data["choices"][0])["pages"] > 0


def test_a_prefix_miss_says_where_and_when_the_page_was_evicted() -> None:
    bench, engine, reader = watched(n_pages=4, max_slots=1)
    first = [*range(12)]
    engine.post(Message(add=[make_task(1, first, 1)]))
    run(engine)
    assert "prefix missed at token 0: not in the cache" in reader.why("r1").text  # type: ignore[union-attr]
    engine.post(Message(add=[make_task(2, range(50, 58), 1)]))
    run(engine)
    evicted = bench.scheduler.n_tick
    engine.post(Message(add=[make_task(3, [*first, 40], 1)]))
    run(engine)
    data = story(reader, "r3")["prefix"]
    assert isinstance(data, dict)
    assert data["hit_tokens"] == data["missed_at"] == 8
    assert 0 < data["evicted_at_tick"] <= evicted
    at = data["evicted_at_tick"]
    assert f"prefix hit 8 tokens, missed at token 8: evicted at tick {at}" in (
        reader.why("r3").text  # type: ignore[union-attr]
    )


def test_equal_pages_of_two_tenants_are_told_apart() -> None:
    _bench, engine, reader = watched(n_pages=4, max_slots=1)
    engine.post(Message(add=[make_task(1, range(12), 1, namespace="a")]))
    run(engine)
    engine.post(Message(add=[make_task(2, range(50, 62), 1)]))
    run(engine)
    for id, namespace, found in ((3, "b", None), (4, "a", True)):
        engine.post(Message(add=[make_task(id, range(12), 1, namespace=namespace)]))
        run(engine)
        data = story(reader, f"r{id}")["prefix"]
        assert isinstance(data, dict)
        assert (data["evicted_at_tick"] is not None) == bool(found)


def test_memory_is_bounded_and_the_newest_are_kept() -> None:
    _bench, engine, reader = watched(WhyReader(n_ended=10, max_live=20), n_pages=64, max_slots=4)
    for i in range(100):
        engine.post(Message(add=[make_task(i, [1, 2, 3], 2)]))
    run(engine)
    assert len(reader._requests) <= 10 and len(reader._names) <= 10 and not reader._live
    assert reader.why("r0") is None
    assert reader.why("r99") is not None


def test_a_refusal_is_told() -> None:
    _bench, engine, reader = watched(n_pages=2)
    engine.post(Message(add=[make_task(1, range(50), 5)]))
    engine.step()
    why = reader.why("r1")
    assert why is not None and "needs 14 pages" in why.text
    assert reader.why("nobody") is None
    again = make_task(2, range(3), 3)
    again.request_id = "r1"
    engine.post(Message(add=[again]))
    engine.step()
    why = reader.why("r1")
    assert why is not None and "refused" not in why.text


def test_an_engine_that_starts_anew_ends_what_lived_in_the_old_one() -> None:
    _bench, engine, reader = watched(n_pages=8)
    engine.post(Message(add=[make_task(1, range(5), 5)]))
    engine.step()
    engine.step()
    engine.post(Message(add=[make_task(2, range(5), 5)]))
    engine.step()
    fresh = Bench(n_pages=8)
    fresh.events.attach(Ticks(reader.apply))
    again = Engine(fresh.scheduler, fresh.runner, fresh.deliver)
    again.post(Message(add=[make_task(1, range(5), 2)]))
    again.step()
    assert story(reader, "r1")["state"] == "decode" or story(reader, "r1")["state"] == "prefill"
    run(again)
    assert story(reader, "r1")["n_output"] == 2
    lost = reader.why("r2")
    assert lost is not None and lost.text.endswith("lost with its engine at tick 3")
    assert story(reader, "r2")["finish_reason"] == "error"
