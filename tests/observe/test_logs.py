from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from astrai.observe import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave logging as it was found."""
    root = logging.getLogger()
    names = ("astrai", "uvicorn", "uvicorn.error", "uvicorn.access")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)
    logging.getLogger("uvicorn.access").disabled = False


def written(handler: logs.QueuedHandler, stream: io.StringIO) -> list[str]:
    handler.close()
    return stream.getvalue().splitlines()


def test_a_json_line_has_the_fields_of_its_record() -> None:
    stream = io.StringIO()
    handler = logs.configure("json", "info", stream=stream)
    fields = {"request_id": "r1", "seconds": 0.25, "text": 'a "b"\nc'}
    logging.getLogger("astrai.request").info("request", extra={"fields": fields})
    logging.getLogger("astrai.request").debug("not asked for")
    logging.getLogger("uvicorn.error").info("Started")
    logging.getLogger("uvicorn.error").warning("Invalid %s", "request")
    logging.getLogger("somebody.else").info("chatter")
    first, second = (json.loads(line) for line in written(handler, stream))
    assert first.items() >= {**fields, "level": "info", "logger": "astrai.request"}.items()
    assert first["time"].endswith("Z")
    assert second["message"] == "Invalid request"


def test_a_text_line_is_one_line_even_if_the_message_is_not() -> None:
    stream = io.StringIO()
    handler = logs.configure("text", "debug", stream=stream)
    fields: dict[str, Any] = {"status": 200, "seconds": 0.12345, "key": "a b", "finish": ["stop"]}
    logging.getLogger("astrai").debug("two\nlines", extra={"fields": fields})
    (line,) = written(handler, stream)
    assert line.endswith('DEBUG   two\\nlines status=200 seconds=0.123 key="a b" finish=["stop"]')


@pytest.mark.parametrize("prompts", [False, True])
def test_an_exception_at_the_edge_is_told_without_what_it_quotes(prompts: bool) -> None:
    stream = io.StringIO()
    handler = logs.configure("json", "info", prompts=prompts, stream=stream)
    quoted = "my secret prompt"
    for name in ("astrai.server.edge", "uvicorn.error"):
        try:
            raise ValueError(quoted)
        except ValueError as error:
            logging.getLogger(name).error("failed", exc_info=error)
    lines = written(handler, stream)
    for line in lines:
        assert (quoted in line) == prompts
        assert "ValueError" in line and "test_logs.py" in line
    assert len(lines) == 2


def test_an_exception_of_the_engine_keeps_its_message() -> None:
    stream = io.StringIO()
    handler = logs.configure("text", "info", stream=stream)
    try:
        raise RuntimeError("free + cached + held = 7, expected 8")
    except RuntimeError:
        logging.getLogger("astrai.inference.engine").exception("the engine loop ended")
    assert "RuntimeError: free + cached + held = 7" in "\n".join(written(handler, stream))


class FullDisk(io.StringIO):
    """Takes lines while it has room."""

    def __init__(self) -> None:
        super().__init__()
        self.room = True

    def write(self, text: str) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_full_disk_loses_lines_and_says_how_many_when_it_has_room_again() -> None:
    stream = FullDisk()
    handler = logs.configure("text", "info", stream=stream)
    log = logging.getLogger("astrai")
    log.info("first")
    wait_for(lambda: "first" in stream.getvalue())
    stream.room = False
    for _ in range(5):
        log.info("lost")
    wait_for(lambda: handler.n_lost == 5)
    stream.room = True
    log.info("last")
    lines = written(handler, stream)
    assert [line.split(" ", 2)[2].strip() for line in lines] == [
        "first",
        "5 log lines were lost",
        "last",
    ]


def test_a_closed_stream_hurts_nobody() -> None:
    stream = io.StringIO()
    handler = logs.configure("json", "info", stream=stream)
    stream.close()
    for _ in range(3):
        logging.getLogger("astrai").info("x")
    wait_for(lambda: handler.n_lost == 3)


def test_a_pipe_that_nobody_reads_never_holds_anybody_up() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        handler = logs.QueuedHandler(stream, max_queued=50)
        handler.setFormatter(logs.TextFormatter(prompts=False))
        log = logging.Logger("astrai.pipe")
        log.addHandler(handler)
        done = threading.Event()

        def talk() -> None:
            for _ in range(500):
                log.info("x" * 1000)
            done.set()

        threading.Thread(target=talk, daemon=True).start()
        assert done.wait(10)
        assert handler.n_lost > 0
        os.set_blocking(reading, False)
        total = 0
        while handler._records.qsize():
            total += drain(reading)
        handler.close()
        assert total + drain(reading) > 0
        os.close(reading)


def drain(fd: int) -> int:
    try:
        return len(os.read(fd, 1 << 20))
    except BlockingIOError:
        time.sleep(0.001)
        return 0


def test_a_line_that_cannot_be_formatted_is_named() -> None:
    stream = io.StringIO()
    handler = logs.configure("text", "info", stream=stream)
    logging.getLogger("astrai").info("%d", "no number")
    logging.getLogger("astrai").info("next")
    first, second = written(handler, stream)
    assert "could not be written: TypeError" in first
    assert second.endswith("next")


@pytest.mark.parametrize(("format", "level"), [("xml", "info"), ("json", "loud")])
def test_unknown_names_are_refused(format: Any, level: str) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        logs.configure(format, level)


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
