"""One picture, many viewers: a frame is made once and sent to everybody who watches."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, Protocol

from astrai.observe.live.picture import Picture

FRAMES_PER_SECOND = 20
MAX_BACKLOG = 8  # frames a slow viewer may owe before it is given the whole picture instead
MAX_VIEWERS = 64
_QUIET_SECONDS = 10.0  # after which a viewer is sent a comment, so that nobody cuts the line


class Source(Protocol):
    def open(self) -> None: ...

    def close(self) -> None: ...

    def pull(self) -> Picture: ...

    def player(self) -> dict[str, Any] | None: ...


class TooManyViewers(RuntimeError):
    """MAX_VIEWERS pages are open already."""


class _Viewer:
    """Owns the frames that were made but not sent to it yet, at most MAX_BACKLOG."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.behind = True  # it needs the whole picture: it is new, or it was too slow
        self.ended = False
        self.filled = asyncio.Event()

    def end(self) -> None:
        self.ended = True
        self.filled.set()

    def push(self, frame: bytes) -> None:
        if self.behind:
            return
        if len(self.frames) >= MAX_BACKLOG:
            self.frames.clear()
            self.behind = True
        else:
            self.frames.append(frame)
        self.filled.set()


class Hub:
    """Sends the pictures of a source to its viewers; opens the source only while there are any.

    Once `ending` says so all viewers are let go: a stream without an end must not hold up a server
    that drains. Owns the viewers and the task that makes frames; all of it runs in one event loop.
    """

    def __init__(self, source: Source, ending: Callable[[], bool] = lambda: False) -> None:
        self.source = source
        self._ending = ending
        self._viewers: set[_Viewer] = set()
        self._making: asyncio.Task[None] | None = None
        self._player: dict[str, Any] | None = None

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The whole picture, then frames, as server-sent events, until the generator is closed."""
        if len(self._viewers) >= MAX_VIEWERS:
            raise TooManyViewers(f"{MAX_VIEWERS} viewers watch already, no more are let in")
        viewer = _Viewer()
        self._viewers.add(viewer)
        try:
            if self._making is None:
                self.source.open()
                self._making = asyncio.create_task(self._make())
            while not viewer.ended:
                if viewer.behind:
                    # What changed until now is in the whole picture; it must not come twice.
                    self._publish()
                    viewer.frames.clear()
                    viewer.behind = False
                    yield _encode({**self.source.pull().whole(), "player": self.source.player()})
                while viewer.frames:
                    yield viewer.frames.popleft()
                viewer.filled.clear()
                if not viewer.behind:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_QUIET_SECONDS):
                            await viewer.filled.wait()
                    if not viewer.filled.is_set():
                        yield b": nothing new\n\n"
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._making is not None:
                self._making.cancel()
                self._making = None
                self.source.close()

    async def _make(self) -> None:
        try:
            while not self._ending():
                await asyncio.sleep(1 / FRAMES_PER_SECOND)
                self._publish()
        finally:  # whatever ended it: nobody is left waiting, and who comes back begins anew
            for viewer in self._viewers:
                viewer.end()

    def _publish(self) -> None:
        picture, player = self.source.pull(), self.source.player()
        if not picture.changed and player == self._player:
            return
        self._player = player
        frame = _encode({**picture.frame(), "player": player})
        for viewer in self._viewers:
            viewer.push(frame)


def _encode(frame: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n"
