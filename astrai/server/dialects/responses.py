"""OpenAI's Responses API: items in, items out, nothing kept between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from astrai.server.chat.parts import Part, Reader, ReasoningPart, TextPart, ToolCallPart
from astrai.server.dialects.replies import ranked
from astrai.server.dialects.shared import Extras, Json, OneAnswer
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import Lists, only, parse, refuse, string, text_of, typed
from astrai.server.http.streaming import event

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta
    from astrai.inference.task import TokenLogprob
    from astrai.models.tokenizer import Tokenizer

LISTS = Lists(
    harmless=frozenset(
        {
            "user",
            "metadata",
            "safety_identifier",
            "service_tier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            # Nothing is ever stored, and the answer says so (`store: false`). What would show it,
            # previous_response_id and reading a response back, is refused.
            "store",
            # Of built-in tools, which are refused themselves.
            "max_tool_calls",
        }
    ),
    refused={
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "truncation": ("disabled",),
    },
)
# What `include` may ask for without effect: a thought is given in plain text, and taken back so.
_HARMLESS_INCLUDES = frozenset({"reasoning.encrypted_content"})
_LOGPROBS = "message.output_text.logprobs"

# What fields of the chat request are called here.
NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
    "response_format": "text",
}

# Fields that are called the same there.
_PASSED = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "parallel_tool_calls",
    "stream",
)

_TEXT_KINDS = ("input_text", "output_text", "text", "refusal")
_TEXT_FIELDS = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
_ITEM_FIELDS = frozenset({"type", "id", "status"})


class ResponseRequest(Extras):
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


def parse_response(body: Json) -> ResponseRequest:
    request = parse(body, ResponseRequest, LISTS)
    for i, name in enumerate(request.include or ()):
        if name != _LOGPROBS and name not in _HARMLESS_INCLUDES:
            raise refuse(f"include[{i}]", name)
    if request.top_logprobs is not None and _LOGPROBS not in (request.include or ()):
        raise ApiError(f"top_logprobs needs include: [{_LOGPROBS!r}]", param="top_logprobs")
    for name, value in (request.reasoning or {}).items():
        if value is not None:
            raise refuse(f"reasoning.{name}", value)
    only(request.stream_options or {}, frozenset({"include_obfuscation"}), "stream_options")
    return request


def chat_body(request: ResponseRequest) -> Json:
    """The same request, as /v1/chat/completions takes it."""
    messages = list(_messages(request.input))
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    return {
        **request.extras(),
        **{name: getattr(request, name) for name in _PASSED},
        "max_tokens": request.max_output_tokens,
        "messages": messages,
        "logprobs": _LOGPROBS in (request.include or ()) or None,
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())],
        "tool_choice": _tool_choice(request.tool_choice),
        "response_format": _format(request.text or {}),
    }


# ── what is asked ───────────────────────────────────────────────────────────────────────────────


def _messages(given: str | list[Json]) -> Iterator[Json]:
    """Items into messages: a thought, a text and calls that follow each other are one turn."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    turn: Json = {}
    for i, item in enumerate(given):
        message = _item(item, f"input[{i}]")
        if turn and not (message["role"] == "assistant" and _goes_on(turn, message)):
            yield turn
            turn = {}
        if message["role"] != "assistant":
            yield message
        else:
            calls = turn.get("tool_calls", []) + message.get("tool_calls", [])
            turn = {"content": "", **turn, **message, **({"tool_calls": calls} if calls else {})}
    if turn:
        yield turn


def _goes_on(turn: Json, message: Json) -> bool:
    if "reasoning_content" in message:
        return False
    return "content" not in message or not (turn["content"] or "tool_calls" in turn)


def _item(item: Json, at: str) -> Json:
    """One item as a message; of an assistant's turn, what it adds to that."""
    match item.get("type", "message"):
        case "message":
            only(item, _ITEM_FIELDS | {"role", "content", "phase"}, at)
            content = text_of(item.get("content"), f"{at}.content", _TEXT_KINDS, _TEXT_FIELDS)
            return {"role": string(item, "role", at), "content": content}
        case "function_call":
            only(item, _ITEM_FIELDS | {"call_id", "name", "arguments"}, at)
            function = {name: string(item, name, at) for name in ("name", "arguments")}
            call = {"id": string(item, "call_id", at), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            only(item, _ITEM_FIELDS | {"call_id", "output"}, at)
            output = text_of(item.get("output"), f"{at}.output", _TEXT_KINDS, _TEXT_FIELDS)
            id = string(item, "call_id", at)
            return {"role": "tool", "tool_call_id": id, "content": output}
        case "reasoning":
            return {"role": "assistant", "reasoning_content": _thought(item, at)}
        case other:
            raise refuse(f"{at}.type", other)


def _thought(item: Json, at: str) -> str:
    only(item, _ITEM_FIELDS | {"summary", "content", "encrypted_content"}, at)
    if item.get("encrypted_content"):
        raise ApiError(
            f"{at}.encrypted_content cannot be read: it is not from here",
            param=f"{at}.encrypted_content",
        )
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        if text := text_of(item.get(name), f"{at}.{name}", (kind,), frozenset()):
            return text
    return ""


def _tool(tool: Json, at: str) -> Json:
    if typed(tool, at)["type"] != "function":
        raise refuse(f"{at}.type", tool["type"])
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _tool_choice(choice: str | Json | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if typed(choice, "tool_choice")["type"] != "function":
        raise refuse("tool_choice.type", choice["type"])
    only(choice, frozenset({"type", "name"}), "tool_choice")
    return {"type": "function", "function": {"name": string(choice, "name", "tool_choice")}}


def _format(text: Json) -> Json | None:
    only(text, frozenset({"format", "verbosity"}), "text")
    if text.get("verbosity") is not None:
        raise refuse("text.verbosity", text["verbosity"])
    if text.get("format") is None:
        return None
    form = typed(text["format"], "text.format")
    if form["type"] != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}


# ── what is answered ────────────────────────────────────────────────────────────────────────────


class ResponseReply(OneAnswer):
    """Items and their events in the order of the API: an item is added, grows, and is done."""

    def __init__(
        self,
        id: str,
        model: str,
        tokenizer: Tokenizer,
        request: ResponseRequest,
        metadata: Any,
        logprobs: int | None,
        reader: Callable[[], Reader] | None,
    ) -> None:
        super().__init__(id, model, reader)
        self.created = int(time.time())
        self.output: list[Json] = []
        self._request = request
        self._metadata = metadata
        self._tokenizer = tokenizer
        self._top = logprobs
        self._sequence = 0
        self._open: Json | None = None  # the item that grows: the last of the output
        self._call = -1  # the index of its call, if it is one
        self._scored: list[Json] = []  # of tokens whose text is still held back
        self._reasoning_tokens = 0

    def whole(self) -> Json:
        return self._body(self._status)

    def events(self, index: int, delta: StreamDelta) -> Iterator[bytes]:
        if not self._sequence:
            for kind in ("created", "in_progress"):
                yield self._event(f"response.{kind}", response=self._body("in_progress"))
        self._scored += self._scores(delta.logprobs or ())
        for part in self._parts(delta):
            if not self._grows(part):
                yield from self._done("completed")
                yield from self._added(part)
            yield from self._grown(part)
            self._scored = []
        if self._open is not None and self._open["type"] == "reasoning":
            self._reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            yield from self._done("incomplete" if self._in_call else self._status)

    def end(self) -> Iterator[bytes]:
        yield self._event(f"response.{self._status}", response=self.whole())

    def failed(self, error: ApiError) -> Iterator[bytes]:
        body = self._body("failed")
        body["error"] = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response=body)

    @property
    def _status(self) -> str:
        return "incomplete" if self.finish_reason == "length" else "completed"

    # An item's life.

    def _grows(self, part: Part) -> bool:
        """Whether `part` is more of the open item."""
        if self._open is None:
            return False
        match part:
            case TextPart():
                return bool(self._open["type"] == "message")
            case ReasoningPart():
                return bool(self._open["type"] == "reasoning")
            case ToolCallPart(index, id, _, _):
                return id is None and index == self._call

    def _added(self, part: Part) -> Iterator[bytes]:
        match part:
            case TextPart():
                content: Json | None = {"type": "output_text", "text": "", "annotations": []}
                item: Json = {"type": "message", "id": _id("msg"), "role": "assistant"}
            case ReasoningPart():
                content = {"type": "reasoning_text", "text": ""}
                item = {"type": "reasoning", "id": _id("rs"), "summary": []}
            case ToolCallPart(index, id, name, _):
                content, self._call = None, index
                item = {"type": "function_call", "id": _id("fc"), "call_id": id, "name": name}
        item["status"] = "in_progress"
        item["arguments" if content is None else "content"] = "" if content is None else []
        self._open = item
        self.output.append(item)
        yield self._at("response.output_item.added", item=item)
        if content is not None:
            if content["type"] == "output_text":
                content["logprobs"] = []
            yield self._at("response.content_part.added", part=content)
            item["content"] = [content]

    def _grown(self, part: Part) -> Iterator[bytes]:
        item, scores = self._item, self._scored
        match part:
            case ToolCallPart(arguments=more):
                item["arguments"] += more
                if more:
                    yield self._at("response.function_call_arguments.delta", delta=more)
            case TextPart(text):
                item["content"][0]["text"] += text
                item["content"][0]["logprobs"] += scores
                yield self._at("response.output_text.delta", delta=text, logprobs=scores)
            case ReasoningPart(text):
                item["content"][0]["text"] += text
                yield self._at("response.reasoning_text.delta", delta=text)

    def _done(self, status: str) -> Iterator[bytes]:
        if self._open is None:
            return
        item = self._open
        item["status"] = status
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._at("response.function_call_arguments.done", **done)
        else:
            part = item["content"][0]
            if item["type"] == "message":
                part["logprobs"] += self._scored
                self._scored = []
                said = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._at("response.output_text.done", **said)
            else:
                yield self._at("response.reasoning_text.done", text=part["text"])
            yield self._at("response.content_part.done", part=part)
        yield self._at("response.output_item.done", item=item)
        self._open = None

    # Bodies.

    def _at(self, kind: str, **fields: Any) -> bytes:
        """An event about the open item, and about its one part if it is of such a kind."""
        item = self._item
        place: Json = {"output_index": len(self.output) - 1}
        if "item" not in fields:
            place["item_id"] = item["id"]
            if item["type"] != "function_call":
                place["content_index"] = 0
        return self._event(kind, **place, **fields)

    @property
    def _item(self) -> Json:
        if self._open is None:
            raise RuntimeError("no item is open")
        return self._open

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(body, kind)

    def _scores(self, tokens: Iterable[TokenLogprob]) -> list[Json]:
        return [ranked(self._tokenizer, token) for token in tokens] if self._top is not None else []

    def _body(self, status: str) -> Json:
        asked = self._request
        ended = status in ("completed", "incomplete")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "model": self.model,
            "instructions": asked.instructions,
            "output": [dict(item) for item in self.output],
            "max_output_tokens": asked.max_output_tokens,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "tools": [{"strict": None, "parameters": None, **tool} for tool in asked.tools or ()],
            "tool_choice": asked.tool_choice or "auto",
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "text": asked.text or {"format": {"type": "text"}},
            "metadata": self._metadata if isinstance(self._metadata, dict) else {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            **({"timings": self.usage.timings()} if ended else {}),
        }

    def _usage(self) -> Mapping[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt + usage.completion,
        }


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
