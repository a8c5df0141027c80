from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.front.sampling_params import SamplingParams
from astrai.inference.engine import Engine, Message
from astrai.inference.task import Task
from astrai.observe.live import hub as hub_module
from astrai.observe.live import source as source_module
from astrai.observe.live.hub import Hub, TooManyViewers
from astrai.observe.live.picture import CACHED, FREE, KEEP_ENDED, Picture
from astrai.observe.live.source import LiveSource, Playback
from tests.mocks import Bench, make_task


def random_task(rng: random.Random, id: int, max_prompt: int = 24, max_output: int = 24) -> Task:
    """Prompts begin alike, so that pages are shared; some requests have further choices."""
    prompt = [1] * rng.randint(1, max_prompt // 2)
    prompt += [rng.randrange(90) for _ in range(rng.randint(1, max_prompt // 2))]
    task = make_task(id, prompt, rng.randint(1, max_output), seed=rng.randrange(3))
    if rng.random() < 0.3:
        params = SamplingParams(max_tokens=task.max_tokens, n=2)
        task = make_task(id, prompt, task.max_tokens, params=params)
        task.siblings = [
            make_task(id + 10_000, prompt, task.max_tokens, params=params, seed=9, index=1)
        ]
    return task


def assert_same(picture: Picture, bench: Bench) -> None:
    """What the picture derived is what the books and the scheduler have."""
    books, scheduler = bench.books, bench.scheduler
    derived = [refs if refs > 0 else 0 for refs in picture.pages]
    assert derived == books.pool.refs
    assert {f for f, refs in enumerate(picture.pages) if refs == FREE} == set(books.pool.free_mask)
    counts = books.counts
    assert picture.counts == (counts.free, counts.cached, counts.held)
    assert picture.pages.count(CACHED) == counts.cached
    assert sum(picture.counts) == counts.total
    live = {id: view for id, view in picture.tasks.items() if view.state != "ended"}
    assert live.keys() == scheduler.tasks.keys()
    for id, task in scheduler.tasks.items():
        assert (live[id].slot, live[id].computed) == (task.slot, task.computed)
        assert live[id].n_cached == task.n_cached
        assert live[id].table == task.page_table


class Page:
    """What the script in the browser keeps, rebuilt from nothing but the frames."""

    def __init__(self) -> None:
        self.tasks: dict[int, list[Any]] = {}
        self.tables: dict[int, list[int]] = {}
        self.pages: list[int] = []

    def read(self, frame: dict[str, Any]) -> None:
        if frame["kind"] == "whole":
            self.tasks = {row[0]: row for row in frame["tasks"]}
            self.tables = {id: list(table) for id, table in frame["tables"]}
            runs = iter(frame["pages"])
            self.pages = [v for value, count in zip(runs, runs) for v in [value] * count]
            return
        for row in frame["tasks"]:
            self.tasks[row[0]] = row
        steps = iter(frame["steps"])
        for id, computed, n_output in zip(steps, steps, steps):
            self.tasks[id][8:10] = [computed, n_output]
        for id, keep, more in frame["tables"]:
            self.tables[id] = self.tables.get(id, [])[:keep] + more
        for id in frame["gone"]:
            del self.tasks[id]
            self.tables.pop(id, None)
        pairs = iter(frame["pages"])
        for page, refs in zip(pairs, pairs):
            self.pages[page] = refs

    def assert_shows(self, picture: Picture) -> None:
        whole = json.loads(json.dumps(picture.whole()))
        assert self.tasks == {row[0]: row for row in whole["tasks"]}
        assert {id: t for id, t in self.tables.items() if t} == dict(whole["tables"])
        assert self.pages == picture.pages


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_pages=st.integers(12, 40),
    depth=st.integers(0, 1),
    prefix_cache=st.booleans(),
    joins_at=st.integers(0, 30),
    every=st.integers(1, 7),
)
def test_the_picture_and_the_page_equal_the_books_whenever_one_looks(
    seed: int, n_pages: int, depth: int, prefix_cache: bool, joins_at: int, every: int
) -> None:
    rng = random.Random(seed)
    bench = Bench(n_pages, max_slots=4, depth=depth, prefix_cache=prefix_cache)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    source, page = LiveSource(lambda: bench.events), Page()
    for tick in range(80):
        if rng.random() < 0.25:
            task = random_task(rng, tick)
            engine.post(Message(add=[task]))
            if rng.random() < 0.1:
                bench.runner.nan_on.add(task.id)
        if rng.random() < 0.05 and bench.scheduler.tasks:
            engine.post(Message(abort=[rng.choice(list(bench.scheduler.tasks))]))
        if tick == joins_at:
            source.open()
        engine.step()
        if tick >= joins_at:
            picture = source.pull()
            assert_same(picture, bench)
            if tick % every == 0 and picture.changed:
                page.read(json.loads(json.dumps(picture.frame())))
                page.assert_shows(picture)
    source.close()
    assert not bench.events, "nobody looks, so nobody listens"


def test_the_timeline_of_a_task_has_no_gaps_and_names_what_it_did() -> None:
    bench = Bench(9, max_slots=3, prefill_budget=4)
    picture = Picture()
    bench.events.attach(picture)
    bench.events.request_snapshot()
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    engine.step()
    engine.post(Message(add=[make_task(i, [i] * 9, 12) for i in range(3)]))
    while not engine.idle:
        engine.step()
    assert bench.scheduler.n_preemptions > 0
    for view in picture.tasks.values():
        kinds = [span[0] for span in view.spans]
        assert kinds[:4] == ["queued", "prefill", "prefill", "prefill"], "9 positions in chunks"
        assert ("preempted" in kinds) == (view.n_preempted > 0)
        assert (view.state, view.reason, view.n_output) == ("ended", "length", 12)
        for span, after in zip(view.spans, view.spans[1:]):
            assert span[1] <= span[2] == after[1]
        assert view.spans[-1][2] is not None


def test_what_ended_is_forgotten_after_a_while() -> None:
    bench = Bench(40)
    picture = Picture()
    bench.events.attach(picture)
    bench.events.request_snapshot()
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    engine.step()
    for i in range(3 * KEEP_ENDED):
        engine.post(Message(add=[make_task(i, [1, 2], 2)]))
        while not engine.idle:
            engine.step()
    assert len(picture.tasks) == KEEP_ENDED
    assert sum(picture._colours.values()) == 0, "colours of ended tasks come back"


def test_a_reader_that_falls_behind_begins_again_from_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_module, "MAX_PENDING", 20)
    bench = Bench(30)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    source = LiveSource(lambda: bench.events)
    source.open()
    engine.post(Message(add=[make_task(i, [i] * 5, 20) for i in range(6)]))
    for _ in range(12):
        engine.step()
    assert not source.pull().known, "events were lost, so the picture is not trusted"
    engine.step()
    assert_same(source.pull(), bench)


def recorded(n_tasks: int = 12) -> tuple[list[Any], Bench]:
    bench = Bench(24)
    events: list[Any] = []
    bench.events.attach(lambda *event: events.append(event))
    bench.events.request_snapshot()
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    rng = random.Random(1)
    engine.step()
    engine.post(Message(add=[make_task(i, [i] * rng.randint(1, 20), 20) for i in range(n_tasks)]))
    while not engine.idle:
        engine.step()
    start = next(i for i, event in enumerate(events) if event[1] == "snapshot")
    return events[start:], bench


def test_a_recording_is_played_forwards_backwards_and_by_steps() -> None:
    events, _ = recorded()
    at_tick = {}
    picture = Picture()
    for event in events:
        picture(*event)
        if event[1] == "tick":
            at_tick[event[0]] = json.dumps(picture.whole())
    ticks = sorted(at_tick)
    now = [0.0]
    playback = Playback(events, clock=lambda: now[0])
    playback.open()
    page = Page()
    playback.control(playing=False, at=0)
    rng = random.Random(2)
    for _ in range(60):
        at = rng.randrange(len(ticks))
        playback.control(at=at)
        assert json.dumps(playback.pull().whole()) == at_tick[ticks[at]]
        page.read(json.loads(json.dumps(playback.pull().frame())))
        page.assert_shows(playback.pull())
    playback.control(at=5)
    playback.control(step=-2)
    assert playback.player()["at"] == 3 and playback.player()["tick"] == ticks[3]
    playback.control(playing=True, speed=10)
    now[0] += 0.5
    playback.pull()
    assert playback.player()["at"] == 8
    now[0] += 1e6
    playback.pull()
    assert playback.player() == {
        "at": len(ticks) - 1,
        "last": len(ticks) - 1,
        "tick": ticks[-1],
        "playing": False,
        "speed": 10,
    }
    with pytest.raises(ValueError, match="speed = 0"):
        playback.control(speed=0)


@pytest.mark.parametrize("events", [[], [(1, "tick", (0.0, 0, 0, 1, 0, 0, 0))]])
def test_a_recording_without_a_beginning_is_refused(events: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected at least one, the first a snapshot"):
        Playback(events)


async def next_frame(viewer: Any) -> dict[str, Any]:
    while True:
        sent = await asyncio.wait_for(anext(viewer), 5)
        if sent.startswith(b"data: "):
            return json.loads(sent[6:])


def test_viewers_come_and_go_and_the_engine_has_one_reader_while_there_is_one() -> None:
    async def main() -> None:
        bench = Bench(30)
        engine = Engine(bench.scheduler, bench.runner, bench.deliver)
        hub = Hub(LiveSource(lambda: bench.events))
        pages = [Page(), Page()]
        first, second = hub.watch(), hub.watch()
        assert not bench.events
        assert not (await next_frame(first))["known"]
        assert len(bench.events._readers) == 1
        engine.post(Message(add=[make_task(i, [i] * 9, 20) for i in range(6)]))
        engine.step()
        whole = await next_frame(first)
        assert whole["kind"] == "whole" and whole["known"]
        pages[0].read(whole)
        pages[1].read(await next_frame(second))
        assert len(bench.events._readers) == 1
        for _ in range(4):
            for _ in range(5):
                engine.step()
            for viewer, page in zip((first, second), pages):
                frame = await next_frame(viewer)
                assert frame["kind"] == "frame" and frame["ticks"] == 5
                page.read(frame)
                page.assert_shows(hub.source.pull())
        await first.aclose()
        assert bench.events
        await second.aclose()
        assert not bench.events and hub._making is None

    asyncio.run(main())


def test_a_slow_viewer_is_given_the_whole_picture_and_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        bench = Bench(30)
        engine = Engine(bench.scheduler, bench.runner, bench.deliver)
        hub = Hub(LiveSource(lambda: bench.events))
        viewer, page = hub.watch(), Page()
        await next_frame(viewer)
        engine.post(Message(add=[make_task(i, [i] * 9, 20) for i in range(6)]))
        for _ in range(3 * hub_module.MAX_BACKLOG):
            engine.step()
            hub._publish()
        assert all(len(v.frames) <= hub_module.MAX_BACKLOG for v in hub._viewers)
        frame = await next_frame(viewer)
        assert frame["kind"] == "whole" and frame["tick"] == bench.scheduler.n_tick
        page.read(frame)
        page.assert_shows(hub.source.pull())
        await viewer.aclose()

    asyncio.run(main())


def test_viewers_are_let_go_when_the_server_ends() -> None:
    async def main() -> None:
        ending: list[bool] = []
        bench = Bench(30)
        hub = Hub(LiveSource(lambda: bench.events), ending=lambda: bool(ending))
        viewer = hub.watch()
        await next_frame(viewer)
        ending.append(True)
        with pytest.raises(StopAsyncIteration):
            await next_frame(viewer)
        assert not bench.events

    asyncio.run(main())


def test_a_picture_that_cannot_be_made_leaves_nobody_waiting() -> None:
    async def main() -> None:
        bench = Bench(30)
        hub = Hub(LiveSource(lambda: bench.events))
        viewer = hub.watch()
        await next_frame(viewer)
        making = hub._making
        assert making is not None
        pull, hub.source.pull = hub.source.pull, lambda: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(StopAsyncIteration):
            await next_frame(viewer)
        with pytest.raises(ZeroDivisionError):
            await making
        hub.source.pull = pull  # type: ignore[method-assign]
        again = hub.watch()
        assert (await next_frame(again))["kind"] == "whole"
        await again.aclose()

    asyncio.run(main())


def test_an_engine_that_was_started_again_is_seen_anew() -> None:
    class Restarted:
        """Events of two engines, one after the other, in one log."""

        def __init__(self) -> None:
            self.bench = Bench(30)

        def attach(self, reader: Any) -> None:
            self.reader = reader
            self.bench.events.attach(reader)

        def detach(self, reader: Any) -> None:
            self.bench.events.detach(reader)

        def request_snapshot(self) -> None:
            self.bench.events.request_snapshot()

        def start_again(self) -> None:
            self.bench = Bench(20)
            self.bench.events.attach(self.reader)

    events = Restarted()
    source = LiveSource(lambda: events)
    source.open()
    for _ in range(2):
        engine = Engine(events.bench.scheduler, events.bench.runner, events.bench.deliver)
        engine.post(Message(add=[make_task(i, [i] * 5, 20) for i in range(6)]))
        for _ in range(12):
            engine.step()
        source.pull()
        engine.step()
        assert_same(source.pull(), events.bench)
        events.start_again()


def test_too_many_viewers_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(hub_module, "MAX_VIEWERS", 1)
        hub = Hub(LiveSource(lambda: Bench(4).events))
        viewer = hub.watch()
        await next_frame(viewer)
        with pytest.raises(TooManyViewers, match="1 viewers watch already"):
            await anext(hub.watch())
        await viewer.aclose()

    asyncio.run(main())
