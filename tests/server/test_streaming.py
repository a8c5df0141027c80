from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from astrai.server.http.streaming import EventStream, event, merge, unless_gone


class Source:
    """Numbers from `start`, `count` of them; counts how many of its generators are open."""

    def __init__(self) -> None:
        self.open = 0

    async def numbers(
        self, start: int, count: int, fail: bool = False
    ) -> AsyncGenerator[int, None]:
        self.open += 1
        try:
            for i in range(start, start + count):
                await asyncio.sleep(0)
                yield i
            if fail:
                raise RuntimeError("broken")
        finally:
            self.open -= 1


async def present() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize("text", ["a\n\nb", "\r", "\u2028", "世界 🙂", 'data: "x"'])
def test_an_event_is_one_line(text: str) -> None:
    raw = event({"t": text})
    assert raw.startswith(b"data: ") and raw.endswith(b"\n\n")
    assert b"\n" not in raw[:-2] and b"\r" not in raw
    assert json.loads(raw[6:]) == {"t": text}


def test_merge_keeps_each_streams_order_and_loses_nothing() -> None:
    source = Source()

    async def run() -> list[tuple[int, int]]:
        counts = [3, 0, 5, 1]
        return [x async for x in merge([source.numbers(10 * i, n) for i, n in enumerate(counts)])]

    items = asyncio.run(run())
    assert [x for i, x in items if i == 0] == [0, 1, 2]
    assert [x for i, x in items if i == 2] == [20, 21, 22, 23, 24]
    assert len(items) == 9
    assert source.open == 0


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_merge_closes_its_streams(n: int) -> None:
    source = Source()

    async def run() -> None:
        async with aclosing(merge([source.numbers(0, 100) for _ in range(n)])) as merged:
            async for _ in merged:
                assert source.open == n
                break
        assert source.open == 0

    asyncio.run(run())


def test_one_broken_stream_ends_the_merge_and_closes_the_others() -> None:
    source = Source()

    async def run() -> None:
        streams = [source.numbers(0, 100), source.numbers(0, 2, fail=True)]
        with pytest.raises(RuntimeError, match="broken"):
            async for _ in merge(streams):
                pass
        assert source.open == 0

    asyncio.run(run())


def test_work_ends_when_the_client_is_gone() -> None:
    async def run() -> None:
        async def answer() -> int:
            return 7

        assert await unless_gone(present, answer()) == 7
        cancelled = asyncio.Event()

        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        with pytest.raises(ClientDisconnect):
            await unless_gone(gone, endless())
        assert cancelled.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("receive", [present, gone])
def test_an_event_stream_closes_its_source(receive: Any) -> None:
    """Also when the client was gone before the first byte, so that nothing was ever started."""
    source = Source()
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def run() -> None:
        numbers = source.numbers(0, 50)
        first = await anext(numbers)

        async def events() -> AsyncGenerator[bytes, None]:
            yield event({"n": first})
            async for n in numbers:
                yield event({"n": n})

        await EventStream(events(), numbers, {})({"type": "http"}, receive, send)
        assert source.open == 0

    asyncio.run(run())
    whole = b"".join(event({"n": n}) for n in range(50))
    assert (b"".join(sent) == whole) == (receive is present)
