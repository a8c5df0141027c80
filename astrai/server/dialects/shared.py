"""What the Responses and the Messages API share: both are a chat with one answer, put differently.

A request becomes that of /v1/chat/completions, so that every field means the same on every route;
an answer becomes parts (parts.py), of which each dialect makes its own items and events.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from astrai.server.chat.format import ChatFormat
from astrai.server.chat.parts import Part, Reader, TextPart, joined
from astrai.server.chat.prompts import Asked, chat_asked
from astrai.server.dialects import openai
from astrai.server.dialects.usage import UsageSum
from astrai.server.http.errors import ApiError

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta

Json = dict[str, Any]


class Extras(openai.SamplingFields):
    """This server's own fields, beside those of each API; they mean what they mean in a chat."""

    chat_template_kwargs: dict[str, Any] | None = None

    def extras(self) -> Json:
        given = {name: getattr(self, name) for name in Extras.model_fields}
        return {name: value for name, value in given.items() if value is not None}


async def asked_of(chat_format: ChatFormat, body: Json, names: Mapping[str, str]) -> Asked:
    """From the body of a chat; `names` are what its fields are called in the dialect."""
    try:
        request = openai.parse_chat({k: v for k, v in body.items() if v is not None})
        return await chat_asked(chat_format, request)
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    def said(text: str) -> str:
        text = re.sub(r"\b(tools\[\d+\])\.function\b", r"\1", text)  # a tool here is the function
        field = re.match(r"\w*", error.param or "")
        if field is None or field[0] not in names:
            return text
        return re.sub(rf"\b{field[0]}\b", names[field[0]], text)

    param = None if error.param is None else said(error.param)
    return ApiError(said(error.message), status=error.status, param=param, code=error.code)


class OneAnswer:
    """The one choice of a dialect's answer, read into parts.

    Owns the reader and the counts; what is made of the parts is its subclass's. `events` is the
    whole of it: an answer that is not streamed is the state that its events leave behind.
    """

    def __init__(self, id: str, model: str, reader: Callable[[], Reader] | None) -> None:
        self.id = id
        self.model = model
        self.usage = UsageSum()
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._reader = reader() if reader is not None else None

    def add(self, index: int, delta: StreamDelta) -> None:
        for _ in self.events(index, delta):
            pass

    def events(self, index: int, delta: StreamDelta) -> Iterator[bytes]:
        raise NotImplementedError

    @property
    def _in_call(self) -> bool:
        """The text so far ends inside a call, whose arguments are not JSON."""
        return self._reader is not None and self._reader.in_call

    def _parts(self, delta: StreamDelta) -> list[Part]:
        """What `delta` adds; also takes note of how the answer ends."""
        self.usage.add(delta)
        if self._reader is None:
            parts: list[Part] = [TextPart(delta.text)] if delta.text else []
        else:
            parts = self._reader.feed(delta.text) if delta.text else []
            if delta.finish_reason is not None:
                parts += self._reader.close()
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        return joined(parts)
