from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from astrai.cli import batch
from astrai.front.admission import QueueFull
from astrai.front.sampling_params import SamplingParams
from tests.server.fake_engine import Delta, FakeEngine


class NarrowEngine(FakeEngine):
    """Its queue holds `room` requests."""

    room = 2

    async def stream(
        self, prompt_ids: list[int], params: SamplingParams, **options: Any
    ) -> AsyncGenerator[Delta, None]:
        if len(self.open) >= self.room:
            raise QueueFull(f"{len(self.open)} requests wait, at most {self.room} may")
        async for delta in super().stream(prompt_ids, params, **options):
            yield delta


def test_a_full_queue_makes_the_next_lines_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FULL_SECONDS", 0.001)
    lines = [json.dumps({"id": i, "prompt": f"line {i}"}) for i in range(9)]
    engine, file = NarrowEngine(), io.StringIO()
    requests = batch.read(lines, {"max_tokens": 4})
    assert asyncio.run(batch.answer_all(engine, requests, file, skip_bad=False)) == 0  # type: ignore[arg-type]
    answers = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(9))
    assert all(answer["usage"]["completion_tokens"] == 4 for answer in answers)
