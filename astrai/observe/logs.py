"""Structured logs: JSON lines or text, written by a thread of their own.

Whoever logs only puts a record in a bounded queue: a full disk, a closed pipe or a reader that
stopped reading costs lines, which are counted, and never a request.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO, get_args

from astrai.config import LogFormat, LogLevel

LEVELS = get_args(LogLevel)
MAX_QUEUED = 10_000

# These talk about requests, whose text may stand in the message of an exception: of an exception
# logged below them only the type and the place is written, unless prompts may be logged.
_EDGE = ("astrai.server", "asyncio", "fastapi", "starlette", "uvicorn")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the log call gave as `extra={"fields": {...}}`."""
    return getattr(record, "fields", {})


class _Formatter(logging.Formatter):
    """Owns nothing but how an exception is told."""

    def __init__(self, *, prompts: bool) -> None:
        super().__init__()
        self._prompts = prompts

    def _error(self, record: logging.LogRecord) -> str | None:
        if not record.exc_info or record.exc_info[0] is None:
            return None
        kind, error, where = record.exc_info
        frames = "".join(traceback.format_tb(where))
        told = kind.__name__
        if self._prompts or not record.name.startswith(_EDGE):
            told += f": {error}"
        return f"{frames}{told}"

    @staticmethod
    def _time(record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(_Formatter):
    """One object a line: time, level, logger, message, then the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self._time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields(record),
        }
        if (error := self._error(record)) is not None:
            line["error"] = error
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """Time, level, message and fields as name=value; a traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().replace("\n", "\\n")
        pairs = [f"{name}={_plain(value)}" for name, value in fields(record).items()]
        line = " ".join((self._time(record), f"{record.levelname:7}", message, *pairs))
        error = self._error(record)
        return line if error is None else f"{line}\n{error}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text[1:-1] if isinstance(value, str) and " " not in text and "\\" not in text else text


class QueuedHandler(logging.Handler):
    """Never waits and never raises.

    Owns a queue of at most `max_queued` records and the thread that writes them.
    """

    def __init__(self, stream: TextIO, max_queued: int = MAX_QUEUED) -> None:
        super().__init__()
        self._n_dropped = 0  # counted under the handler's lock, the next two in the thread
        self._n_failed = 0
        self._n_told = 0
        self._stream = stream
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(max_queued)
        self._thread = threading.Thread(target=self._write_all, name="astrai-logs", daemon=True)
        self._thread.start()

    @property
    def n_lost(self) -> int:
        """Lines that were never written."""
        return self._n_dropped + self._n_failed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._n_dropped += 1

    def close(self) -> None:
        """Write what is queued, as far as that takes less than a second."""
        if self._thread.is_alive():
            try:
                self._records.put(None, timeout=0.5)
                self._thread.join(timeout=0.5)
            except queue.Full:
                pass
        super().close()

    def _write_all(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                line = self.format(record)
            except Exception as error:  # arguments that do not fit their message
                line = f"a log line of {record.name} could not be written: {type(error).__name__}"
            self._write(line)

    def _write(self, line: str) -> None:
        lost = self.n_lost
        try:
            if lost > self._n_told:
                told = logging.LogRecord(__name__, logging.WARNING, "", 0, "", None, None)
                told.msg, told.args = "%d log lines were lost", (lost - self._n_told,)
                self._stream.write(self.format(told) + "\n")
            self._stream.write(line + "\n")
            self._stream.flush()
            self._n_told = lost
        except (OSError, ValueError):  # no room, nobody reads, or closed
            self._n_failed += 1


class LogSettings(NamedTuple):
    format: LogFormat = "text"
    level: LogLevel = "info"
    prompts: bool = False


_settings = LogSettings()


def log_settings() -> LogSettings:
    """What `configure` was last told, for a process started by this one."""
    return _settings


def configure(
    format: LogFormat = "text",
    level: LogLevel = "info",
    prompts: bool = False,
    stream: TextIO | None = None,
) -> QueuedHandler:
    """Send every log of this process, the HTTP server's included, to `stream` in one shape.

    Raises ValueError if `format` or `level` is not known.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r}, expected one of {', '.join(LEVELS)}")
    makers = {"json": JsonFormatter, "text": TextFormatter}
    if format not in makers:
        raise ValueError(f"log format {format!r}, expected one of {', '.join(makers)}")
    global _settings
    _settings = LogSettings(format, level, prompts)
    handler = QueuedHandler(stream or sys.stderr)
    handler.setFormatter(makers[format](prompts=prompts))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        if isinstance(old, QueuedHandler):
            old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # other people's libraries
    logging.getLogger("astrai").setLevel(level.upper())
    # Their own handlers would write a second line, and the access log a second line per request.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.access").disabled = True
    # Its infos say that it starts and stops, which `serve` says itself.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    return handler
