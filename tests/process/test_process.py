"""The engine in its own process: what crosses, and what happens when the process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from astrai.config import EngineConfig
from astrai.front.async_engine import AsyncEngine, StreamDelta
from astrai.front.sampling_params import SamplingParams
from astrai.inference.task import Update
from astrai.process import engine_process
from astrai.process.engine_child import Watch
from astrai.process.engine_process import ProcessLink
from tests.mocks import oracle
from tests.process.mock_engine import BREAK, BUILDER, HANG, KILL, SLOW


@contextmanager
def running(**options: Any) -> Iterator[tuple[AsyncEngine, ProcessLink]]:
    link = ProcessLink(EngineConfig(page_size=16, **options), BUILDER)
    try:
        engine = AsyncEngine(link=link)
        engine.start()
        yield engine, link
    finally:
        link.stop()


async def answer(
    engine: AsyncEngine, prompt: list[int], name: str = "a", **params: Any
) -> list[StreamDelta]:
    params = {"max_tokens": 12, "seed": 3, "ignore_eos": True, **params}
    stream = engine.stream(prompt, SamplingParams(**params), request_id=name)
    return [delta async for delta in stream]


def ids(deltas: list[StreamDelta], index: int = 0) -> list[int]:
    return [i for delta in deltas if delta.index == index for i in delta.token_ids]


async def until(done: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.005)


def test_what_crosses_is_what_the_loop_said() -> None:
    with running() as (engine, _link):
        seen: list[str] = []

        async def run() -> None:
            engine.events.attach(lambda tick, kind, values: seen.append(kind))
            whole = await answer(engine, [7] * 40)
            assert ids(whole) == oracle([7] * 40, 12, 3)
            usage = whole[-1].usage
            assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (40, 12)
            timings = usage.timings
            assert None not in (timings.queued, timings.prefill, timings.decode)
            assert timings.n_output == 12
            again = await answer(engine, [7] * 40)
            assert again[-1].usage is not None and again[-1].usage.cached_tokens == 32
            two = await answer(engine, [9, 9], n=2)
            assert ids(two, 0) == oracle([9, 9], 12, 3) != ids(two, 1)
            with pytest.raises(ValueError, match="exceeds the context"):
                await answer(engine, [1] * 5000)
            await until(lambda: "end" in seen and engine.stats()["pages_held"] == 0)
            assert engine.healthy().ok and engine.stats()["pages_total"] == 64

        asyncio.run(run())
        assert {"arrive", "admit", "prefill", "decode", "first_token"} <= set(seen)


def test_events_come_once_however_often_they_are_asked_for() -> None:
    ended: list[int] = []
    with running() as (engine, link):
        engine.events.attach(lambda tick, kind, values: ended.extend([tick] * (kind == "end")))
        link._sender.send(Watch(True))

        async def run() -> None:
            await answer(engine, [4])
            await until(lambda: ended)

        asyncio.run(run())
    assert len(ended) == 1


def test_closing_a_stream_and_aborting_reach_the_process() -> None:
    with running() as (engine, _link):

        async def run() -> None:
            params = SamplingParams(max_tokens=900, ignore_eos=True)
            stream = engine.stream([SLOW], params, request_id="closed")
            await anext(stream)
            await stream.aclose()
            await until(lambda: engine.stats()["running"] == 0)
            task = asyncio.create_task(answer(engine, [SLOW], "gone", max_tokens=900))
            await until(lambda: engine.stats()["running"] == 1)
            assert engine.abort("gone") and not engine.abort("unknown")
            assert (await task)[-1].finish_reason == "abort"
            await until(lambda: engine.stats()["pages_held"] == 0)

        asyncio.run(run())


@pytest.mark.parametrize("how", ["SIGKILL", "loop"])
def test_a_dead_engine_is_told_to_who_had_begun_and_the_others_are_served_by_the_next(
    how: str,
) -> None:
    with running(max_slots=1) as (engine, link):

        async def run() -> None:
            first = asyncio.create_task(answer(engine, [SLOW], "begun", max_tokens=900))
            await until(lambda: engine.stats()["running"] == 1)
            waiting = [asyncio.create_task(answer(engine, [5, i], f"w{i}")) for i in range(3)]
            left = asyncio.create_task(answer(engine, [8], "left"))
            await until(lambda: engine.stats()["waiting"] == 4)
            left.cancel()
            died = link.pid
            if how == "SIGKILL":
                os.kill(died, signal.SIGKILL)
            else:
                link._sender.send("no message")  # the reader thread of the child fails
            last = (await first)[-1]
            assert last.finish_reason == "error"
            for i, task in enumerate(waiting):
                assert ids(await task) == oracle([5, i], 12, 3)
            assert link.pid != died
            await until(lambda: engine.healthy().ok and engine.stats()["pages_held"] == 0)
            if how == "SIGKILL":
                assert "SIGKILL" in (last.error or "")

        asyncio.run(run())


def test_a_broken_loop_is_a_dead_engine() -> None:
    with running(max_slots=1) as (engine, _link):

        async def run() -> None:
            last = (await answer(engine, [BREAK]))[-1]
            assert last.finish_reason == "error" and "not callable" in (last.error or "")
            await until(lambda: engine.healthy().ok)
            assert ids(await answer(engine, [4])) == oracle([4], 12, 3)

        asyncio.run(run())


def test_a_request_that_kills_every_engine_is_ended_and_then_all_is_well() -> None:
    with running() as (engine, _link):

        async def run() -> None:
            last = (await answer(engine, [KILL], "poison"))[-1]
            assert last.finish_reason == "error" and "SIGKILL" in (last.error or "")
            assert ids(await answer(engine, [4])) == oracle([4], 12, 3)

        asyncio.run(run())


def test_too_many_deaths_are_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "MAX_QUICK_DEATHS", 1)
    with running() as (engine, link):

        async def run() -> None:
            os.kill(link.pid, signal.SIGKILL)
            await until(lambda: engine.ended is not None)
            assert "given up" in (engine.ended or "") and not engine.healthy().ok
            last = (await answer(engine, [4]))[-1]
            assert last.finish_reason == "error" and "given up" in (last.error or "")

        asyncio.run(run())


def test_stopping_while_an_engine_is_to_be_started_again_starts_none() -> None:
    with running() as (engine, link):

        async def run() -> None:
            first = link.pid
            os.kill(first, signal.SIGKILL)
            await until(lambda: link.pid != first and engine.healthy().ok)
            os.kill(link.pid, signal.SIGKILL)  # the next start waits a while
            await until(lambda: "started again" in engine.healthy().reason)

        asyncio.run(run())
        died = link.pid
        link.stop()
        assert engine.ended == "the engine was stopped" and link.pid == died


def test_supervision_that_fails_leaves_nobody_waiting() -> None:
    with running() as (engine, link):
        deliver = link._deliver

        def fail_once(updates: list[Update]) -> None:
            link._deliver = deliver
            raise RuntimeError("not delivered")

        async def run() -> None:
            link._deliver = fail_once
            last = (await answer(engine, [SLOW]))[-1]
            assert last.finish_reason == "error" and "not delivered" in (last.error or "")
            assert "not delivered" in (engine.ended or "")

        asyncio.run(run())


def test_a_tick_that_never_ends_is_said_here_too() -> None:
    with running(stall_seconds=0.2) as (engine, link):

        async def run() -> None:
            task = asyncio.create_task(answer(engine, [HANG]))
            await until(lambda: "no tick for" in engine.healthy().reason)
            assert engine.stats()["running"] == 1
            task.cancel()

        asyncio.run(run())
        link._child.kill()  # it would take its time to stop


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_an_engine_that_falls_silent_is_replaced() -> None:
    with running(stall_seconds=0.5) as (engine, link):

        async def run() -> None:
            died = link.pid
            os.kill(died, signal.SIGSTOP)
            assert ids(await answer(engine, [4])) == oracle([4], 12, 3)
            assert link.pid != died

        asyncio.run(run())


def test_what_loading_raises_is_raised_here() -> None:
    link = ProcessLink(EngineConfig(model="no-such-model"), BUILDER)
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        AsyncEngine(link=link)
    link.stop()
