"""A recording made where the loop is: in the engine's own process, as `astrai serve` runs it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from astrai.config import EngineConfig
from astrai.front.async_engine import AsyncEngine
from astrai.front.sampling_params import SamplingParams
from astrai.observe.recording import Recording
from astrai.observe.replay import replay
from astrai.process.engine_process import ProcessLink
from tests.observe.recorded_engine import BUILDER


def test_an_engine_process_is_recorded_and_replayed_also_when_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    link = ProcessLink(EngineConfig(page_size=16, record=str(path)), BUILDER)
    try:
        engine = AsyncEngine(link=link)
        engine.start()

        async def say(prompt: list[int], n_deltas: int | None = None, n: int = 1) -> None:
            params = SamplingParams(max_tokens=30, n=n, ignore_eos=True)
            stream = engine.stream(prompt, params, request_id=str(prompt))
            i = 0
            async for _ in stream:
                i += 1
                if i == n_deltas:
                    await stream.aclose()
                    return

        async def run() -> None:
            shared = list(range(40))
            await asyncio.gather(say(shared, n=2), say([*shared, 1]), say([9], n_deltas=2))
            await say([*shared, 2])
            await say([7, 8], n_deltas=1)
            os.kill(link.pid, signal.SIGKILL)
            await say([3])

        asyncio.run(run())
    finally:
        link.stop()
    killed = replay(Recording(tmp_path / "run.old.jsonl"))
    assert killed.difference is None and killed.n_tasks >= 4
    kinds = {event.kind for event in Recording(tmp_path / "run.old.jsonl").events()}
    assert {"abort", "fork", "share", "end"} <= kinds
    assert replay(Recording(path)).difference is None
