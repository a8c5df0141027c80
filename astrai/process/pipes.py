"""Messages between the server's process and the engine's: pickled lists with a length in front."""

from __future__ import annotations

import pickle
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

_LENGTH = struct.Struct("<Q")
_IDLE_SECONDS = 0.1


class Sender:
    """Writes messages in a thread of its own, so that nobody who sends ever waits for the reader.

    What has gathered meanwhile goes in one write.

    Owns its thread and what was not written yet. Does not own the stream.
    """

    def __init__(self, stream: BinaryIO, extra: Callable[[], list[Any]] = list) -> None:
        """`extra()` gives messages to put at the end of every write, and is asked about ten times
        a second if there is nothing to write."""
        self._stream = stream
        self._extra = extra
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="astrai-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: Any) -> None:
        self._queue.put(message)

    def close(self, timeout: float) -> None:
        """Write what was sent before, and end."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        closing = False
        while not closing:
            messages = self._gathered()
            if closing := None in messages:
                messages = messages[: messages.index(None)]
            messages += self._extra()
            try:
                if messages:
                    write(self._stream, messages)
            except (OSError, ValueError):  # closed, or its reader is gone: its owner finds out
                return

    def _gathered(self) -> list[Any]:
        try:
            messages = [self._queue.get(timeout=_IDLE_SECONDS)]
        except queue.Empty:
            return []
        while not self._queue.empty():
            messages.append(self._queue.get())
        return messages


def write(stream: BinaryIO, messages: list[Any]) -> None:
    body = pickle.dumps(messages, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read(stream: BinaryIO) -> Iterator[Any]:
    """Messages until the other end closes, or dies in the middle of one."""
    while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
        (size,) = _LENGTH.unpack(head)
        body = stream.read(size)
        if len(body) < size:
            return
        yield from pickle.loads(body)
