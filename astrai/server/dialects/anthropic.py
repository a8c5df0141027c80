"""Anthropic's Messages API: blocks in, blocks out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from astrai.server.chat.format import ChatFormat
from astrai.server.chat.parts import Part, Reader, ReasoningPart, TextPart, ToolCallPart
from astrai.server.dialects.shared import Extras, Json, OneAnswer
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import Lists, only, parse, refuse, string, text_of, typed
from astrai.server.http.streaming import event

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta

LISTS = Lists(
    harmless=frozenset(
        {
            "metadata",
            "service_tier",
            # Prefixes are cached without being told to.
            "cache_control",
            "user_profile_id",
            "workspace_id",
        }
    ),
    refused={
        "billing_policy": (),
        "compaction": (),
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "fallback_credit_token": (),
        "fallbacks": ([],),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "thread": (),
    },
)
# What fields of the chat request are called here.
NAMES = {"stop": "stop_sequences", "response_format": "output_config"}
_THINKING_KINDS = ("enabled", "disabled", "adaptive")

_TEXT_FIELDS = frozenset({"cache_control", "citations"})
# Of a tool: what says how it is called from elsewhere, or when it is loaded.
_HARMLESS_TOOL = frozenset({"type", "cache_control", "eager_input_streaming", "input_examples"})


class CountRequest(Extras):
    """What counts in /v1/messages/count_tokens; the fields of sampling do not."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


def parse_messages(body: Json) -> MessagesRequest:
    return parse(body, MessagesRequest, LISTS)


def parse_count(body: Json) -> CountRequest:
    return parse(body, CountRequest, LISTS)


def chat_body(request: CountRequest, chat_format: ChatFormat) -> Json:
    """The same request, as /v1/chat/completions takes it."""
    messages = [m for i, given in enumerate(request.messages) for m in _messages(given, i)]
    prefilled = bool(messages) and messages[-1]["role"] == "assistant"
    if prefilled and "tool_calls" in messages[-1]:
        raise ApiError(
            "messages: the last one calls tools, whose results are missing", param="messages"
        )
    system = text_of(request.system, "system", ("text",), _TEXT_FIELDS)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    choice = request.tool_choice or {}
    body = {
        **request.extras(),
        "model": request.model,
        "messages": messages,
        # An answer that the client began is gone on with, as this API does.
        "continue_final_message": prefilled or None,
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())],
        "tool_choice": _tool_choice(choice) if choice else None,
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "response_format": _format(request.output_config or {}),
    }
    if request.thinking is not None:
        body["chat_template_kwargs"] = {
            **_thinking(request.thinking, chat_format),
            **(request.chat_template_kwargs or {}),
        }
    if isinstance(request, MessagesRequest):
        for name in ("max_tokens", "temperature", "top_p", "top_k", "stream"):
            body[name] = getattr(request, name)
        body["stop"] = request.stop_sequences
    return body


# ── what is asked ───────────────────────────────────────────────────────────────────────────────


def _messages(given: Json, i: int) -> list[Json]:
    """One message of blocks as messages of a chat: results of tools are messages of their own."""
    at = f"messages[{i}]"
    only(given, frozenset({"role", "content"}), at)
    role, content = string(given, "role", at), given.get("content")
    if role not in ("user", "assistant", "system"):
        raise ApiError(f"{at}.role: {role!r}, expected 'user' or 'assistant'", param=f"{at}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise ApiError(
            f"{at}.content: expected a string or a list of blocks", param=f"{at}.content"
        )
    read = _assistant if role == "assistant" else _user
    return read(role, content, f"{at}.content")


def _user(role: str, blocks: list[Any], at: str) -> list[Json]:
    results: list[Json] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        here = f"{at}[{i}]"
        match typed(block, here)["type"]:
            case "text":
                texts.append(text_of([block], at, ("text",), _TEXT_FIELDS))
            case "tool_result" if role == "user":
                results.append(_result(block, here))
            case other:
                raise refuse(f"{here}.type", other)
    said = [{"role": role, "content": "".join(texts)}] if texts or not results else []
    return results + said


def _result(block: Json, at: str) -> Json:
    known = frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"})
    only(block, known, at)
    text = text_of(block.get("content"), f"{at}.content", ("text",), _TEXT_FIELDS)
    if block.get("is_error"):
        text = f"Error: {text}"  # templates have no other place for it
    return {"role": "tool", "tool_call_id": string(block, "tool_use_id", at), "content": text}


def _assistant(role: str, blocks: list[Any], at: str) -> list[Json]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for i, block in enumerate(blocks):
        here = f"{at}[{i}]"
        match typed(block, here)["type"]:
            case "text":
                texts.append(text_of([block], at, ("text",), _TEXT_FIELDS))
            case "thinking":
                only(block, frozenset({"type", "thinking", "signature"}), here)
                thoughts.append(string(block, "thinking", here))
            case "tool_use":
                calls.append(_call(block, here))
            case other:
                raise refuse(f"{here}.type", other)
    message: Json = {"role": role, "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _call(block: Json, at: str) -> Json:
    only(block, frozenset({"type", "id", "name", "input", "cache_control", "caller"}), at)
    if not isinstance(block.get("input"), dict):
        raise ApiError(f"{at}.input: expected an object", param=f"{at}.input")
    arguments = json.dumps(block["input"], ensure_ascii=False)
    function = {"name": string(block, "name", at), "arguments": arguments}
    return {"id": string(block, "id", at), "type": "function", "function": function}


def _tool(tool: Json, at: str) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise refuse(f"{at}.type", tool["type"])
    wanted = ("name", "description", "strict")
    only(tool, _HARMLESS_TOOL.union(wanted, ("input_schema",)), at)
    if not isinstance(tool.get("input_schema"), dict):
        raise ApiError(f"{at}.input_schema: expected an object", param=f"{at}.input_schema")
    function = {name: tool[name] for name in wanted if tool.get(name) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(choice: Json) -> Any:
    kind = typed(choice, "tool_choice")["type"]
    only(choice, frozenset({"type", "name", "disable_parallel_tool_use"}), "tool_choice")
    match kind:
        case "auto" | "none":
            return kind
        case "any":
            return "required"
        case "tool":
            name = string(choice, "name", "tool_choice")
            return {"type": "function", "function": {"name": name}}
    raise refuse("tool_choice.type", kind)


def _thinking(thinking: Json, chat_format: ChatFormat) -> Json:
    """What it is in the template's words. `budget_tokens` is a target: max_tokens is the limit."""
    kind = typed(thinking, "thinking")["type"]
    only(thinking, frozenset({"type", "budget_tokens", "display"}), "thinking")
    if kind not in _THINKING_KINDS:
        raise refuse("thinking.type", kind)
    if thinking.get("display") not in (None, "summarized"):
        raise refuse("thinking.display", thinking["display"])
    if kind == "adaptive":
        return {}
    if chat_format.switches_thinking:
        return {"enable_thinking": kind == "enabled"}
    if chat_format.thinks != (kind == "enabled"):
        can = "always" if chat_format.thinks else "never"
        raise ApiError(
            f"thinking.type: {kind!r}, but the model {can} thinks",
            param="thinking.type",
            code="not_implemented",
        )
    return {}


def _format(config: Json) -> Json | None:
    only(config, frozenset({"format", "effort"}), "output_config")
    if config.get("effort") is not None:
        raise refuse("output_config.effort", config["effort"])
    if config.get("format") is None:
        return None
    form = typed(config["format"], "output_config.format")
    only(form, frozenset({"type", "schema"}), "output_config.format")
    if form["type"] != "json_schema":
        raise refuse("output_config.format.type", form["type"])
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.get("schema")}}


# ── what is answered ────────────────────────────────────────────────────────────────────────────


class MessageReply(OneAnswer):
    """Blocks and their events: a block starts, grows by deltas, and stops."""

    def __init__(
        self, id: str, model: str, n_prompt: int, reader: Callable[[], Reader] | None
    ) -> None:
        super().__init__(id, model, reader)
        self._n_prompt = n_prompt
        self._content: list[Json] = []
        self._inputs: dict[int, str] = {}  # JSON text of a call's input, by block
        self._started = False
        self._open = False  # the last block may grow
        self._call = -1  # the index of its call, if it is one

    def whole(self) -> Json:
        return self._message(self._blocks(), self._usage()) | {"timings": self.usage.timings()}

    def events(self, index: int, delta: StreamDelta) -> Iterator[bytes]:
        if not self._started:
            self._started = True
            usage = {"input_tokens": self._n_prompt, "output_tokens": 0}
            yield _event("message_start", message=self._message([], usage))
            yield _event("ping")
        for part in self._parts(delta):
            if not self._grows(part):
                yield from self._stop()
                yield self._start(part)
            yield from self._grow(part)

    def end(self) -> Iterator[bytes]:
        yield from self._stop()
        ended = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        timings = self.usage.timings()
        yield _event("message_delta", delta=ended, usage=self._usage(), timings=timings)
        yield _event("message_stop")

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield event(error.anthropic_body(), "error")

    # A block's life.

    def _grows(self, part: Part) -> bool:
        """Whether `part` is more of the open block."""
        if not self._open:
            return False
        kind = self._content[-1]["type"]
        match part:
            case TextPart():
                return bool(kind == "text")
            case ReasoningPart():
                return bool(kind == "thinking")
            case ToolCallPart(index, id, _, _):
                return kind == "tool_use" and id is None and index == self._call

    def _start(self, part: Part) -> bytes:
        match part:
            case TextPart():
                block: Json = {"type": "text", "text": ""}
            case ReasoningPart():
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case ToolCallPart(index, id, name, _):
                self._call = index
                block = {"type": "tool_use", "id": id, "name": name, "input": {}}
        self._content.append(block)
        self._open = True
        return _event("content_block_start", index=len(self._content) - 1, content_block=block)

    def _grow(self, part: Part) -> Iterator[bytes]:
        at = len(self._content) - 1
        block = self._content[at]
        match part:
            case TextPart(text):
                block["text"] += text
                delta = {"type": "text_delta", "text": text}
            case ReasoningPart(text):
                block["thinking"] += text
                delta = {"type": "thinking_delta", "thinking": text}
            case ToolCallPart(arguments=more):
                self._inputs[at] = self._inputs.get(at, "") + more
                delta = {"type": "input_json_delta", "partial_json": more}
        if any(delta[name] for name in delta.keys() - {"type"}):
            yield _event("content_block_delta", index=at, delta=delta)

    def _stop(self) -> Iterator[bytes]:
        if self._open:
            self._open = False
            yield _event("content_block_stop", index=len(self._content) - 1)

    # Bodies.

    def _blocks(self) -> list[Json]:
        return [
            {**block, "input": _object(self._inputs.get(i, ""))}
            if block["type"] == "tool_use"
            else block
            for i, block in enumerate(self._content)
        ]

    def _message(self, content: list[Json], usage: Mapping[str, Any]) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": usage,
        }

    @property
    def _stop_reason(self) -> str | None:
        if self.finish_reason is None:
            return None
        if self.finish_reason == "length":
            return "max_tokens"
        if self._stop_sequence is not None:
            return "stop_sequence"
        return "tool_use" if self._inputs and not self._in_call else "end_turn"

    @property
    def _stop_sequence(self) -> str | None:
        return self.stop_reason if isinstance(self.stop_reason, str) else None

    def _usage(self) -> Mapping[str, Any]:
        """`input_tokens` are those that were computed; the others were read from the cache."""
        usage = self.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.completion,
        }


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _object(text: str) -> Json:
    """A call's input; what was cut short is no object, and stays readable as text."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"partial_json": text}
