"""The requests that are open, and the last that ended: what may be asked about them by id."""

from __future__ import annotations

import re
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from astrai.server.dialects.usage import UsageSum
from astrai.server.http.errors import ApiError

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta, Usage

OPENED = "astrai.request"  # where the OpenRequest of a request stands in its ASGI scope
MAX_ENDED = 1024
# Choices of one request that are told one by one.
MAX_CHOICES = 64

# What a client may choose: safe in a header, a path and a log line. No "/": see `engine_ids`.
_ID = re.compile(r"[A-Za-z0-9._:+=@-]{1,128}")


@dataclass(slots=True)
class _Choice:
    n_tokens: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(slots=True)
class OpenRequest:
    """One HTTP request in the engine; `owner` is whose it is (guard.py), nobody else sees it."""

    id: str
    route: str
    model: str
    owner: str
    namespace: str
    n_prompts: int
    n_choices: int  # of all prompts
    timeout: float | None = None  # seconds
    created: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.monotonic)
    ended: float | None = None
    aborted: bool = False  # by DELETE
    error: str | None = None
    usage: UsageSum = field(default_factory=UsageSum)
    choices: dict[int, _Choice] = field(default_factory=dict)

    @property
    def engine_ids(self) -> list[str]:
        """What its prompts are called in the engine."""
        if self.n_prompts == 1:
            return [self.id]
        return [f"{self.id}/{i}" for i in range(self.n_prompts)]

    @property
    def headers(self) -> dict[str, str]:
        """Its id, where each family of clients looks for it."""
        return {"x-request-id": self.id, "request-id": self.id}

    @property
    def state(self) -> str:
        if self.ended is not None:
            return "ended"
        return "answering" if self.choices else "waiting"

    def note(self, index: int, delta: StreamDelta) -> None:
        self.usage.add(delta)
        choice = self.choices.get(index)
        if choice is None:
            if index >= MAX_CHOICES:
                return
            choice = self.choices[index] = _Choice()
        choice.n_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            choice.finish_reason, choice.usage = delta.finish_reason, delta.usage

    def body(self) -> dict[str, Any]:
        end = time.monotonic() if self.ended is None else self.ended
        return {
            "id": self.id,
            "object": "request",
            "route": self.route,
            "model": self.model,
            "state": self.state,
            "created": int(self.created),
            "seconds": round(end - self.begun, 6),
            "prompts": self.n_prompts,
            "choices_total": self.n_choices,
            "choices": [_told(i, choice) for i, choice in sorted(self.choices.items())],
            "timings": self.usage.timings(),
            "error": self.error,
        }


def _told(index: int, choice: _Choice) -> dict[str, Any]:
    usage = choice.usage
    return {
        "index": index,
        "completion_tokens": choice.n_tokens,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": None if usage is None else usage.prompt_tokens,
        "cached_tokens": None if usage is None else usage.cached_tokens,
        "timings": None if usage is None else usage.timings._asdict(),
    }


class RequestBook:
    """Owns the list of open requests and of the last `MAX_ENDED` that ended, not their streams."""

    def __init__(self) -> None:
        self._open: dict[str, OpenRequest] = {}
        self._ended: OrderedDict[str, OpenRequest] = OrderedDict()

    def open(self, request: OpenRequest) -> None:
        """Enter it under its id, or under a fresh one if an open request, or another's, has that.

        Else who takes the id of another's request would hide that one from its owner.
        """
        known = self._ended.get(request.id)
        if request.id in self._open or (known is not None and known.owner != request.owner):
            request.id = f"req-{uuid.uuid4().hex}"
        self._open[request.id] = request

    def close(self, request: OpenRequest, error: str | None = None) -> None:
        """It ended; a second call changes nothing."""
        if self._open.pop(request.id, None) is None:
            return
        request.ended, request.error = time.monotonic(), error
        self._ended.pop(request.id, None)
        self._ended[request.id] = request
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def find(self, id: str, owner: str) -> OpenRequest:
        """ApiError 404 if there is none, or if it is somebody else's."""
        request = self._open.get(id) or self._ended.get(id)
        if request is None or request.owner != owner:
            raise ApiError(
                f"no request {id!r} is open or among the last {MAX_ENDED} that ended",
                status=404,
                code="request_not_found",
            )
        return request


def chosen_id(*asked: tuple[str, str | None]) -> str | None:
    """The id that a client chose, by (where it said so, id); ApiError 400 if it cannot be one."""
    chosen: str | None = None
    for where, id in asked:
        if id is None:
            continue
        if not _ID.fullmatch(id):
            raise ApiError(
                f"{where}: {id[:140]!r} of {len(id)} characters, expected 1 to 128 letters, "
                "digits or . _ : + = @ -",
                param=where,
            )
        if chosen is not None and id != chosen:
            raise ApiError(f"{where}: {id!r} differs from the header's {chosen!r}", param=where)
        chosen = id
    return chosen
