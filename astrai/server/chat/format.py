"""A conversation as the served model reads it, and its answer as the model writes it.

The one way from a chat route's request to a prompt, whatever the route's own shapes are.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from astrai.front.structured import StructuredOutput
from astrai.server.chat import reasoning
from astrai.server.chat.parts import Reader
from astrai.server.chat.reasoning import ThinkReader
from astrai.server.chat.tools import Style, Toolset, instructions, style_of
from astrai.server.chat.tools.grammar import Thought, content_grammar, tool_grammar
from astrai.server.chat.tools.reader import ToolReader

if TYPE_CHECKING:
    from astrai.front.sampling_params import SamplingParams
    from astrai.models.tokenizer import Tokenizer

Message = dict[str, Any]


class TemplateRefusal(ValueError):
    """The model has no chat template, or it refuses the conversation, in its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat route wants answered.

    `messages` are OpenAI's, with content as one string: {"role": "system" | "developer" | "user"
    | "assistant" | "tool", "content": …}; an assistant's may have "reasoning_content" and
    "tool_calls": [{"id": …, "type": "function", "function": {"name": …, "arguments": JSON text}}],
    a tool's has "tool_call_id".
    """

    messages: Sequence[Message]
    toolset: Toolset = field(default_factory=Toolset)
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the answer goes on with the last message
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_characters(self) -> int:
        return sum(len(message.get("content") or "") for message in self.messages)


class ChatPrompt(NamedTuple):
    """A conversation in token ids, and how to read what comes after them."""

    ids: list[int]
    structured: StructuredOutput | None  # what the text must be, a thought and calls included
    reader: Callable[[], Reader] | None  # one for each choice; None: all text is said
    shows_special: bool  # a marker is a special token, so the text must show those

    def applied(self, params: SamplingParams) -> SamplingParams:
        skip = params.skip_special_tokens and not self.shows_special
        return replace(params, structured=self.structured, skip_special_tokens=skip)


class ChatFormat:
    """How the served model reads conversations and writes answers, by its chat template.

    Owns nothing but what the template was found to know. Does not own the tokenizer. Raises
    ValueError for the name of a parser that is not there.
    """

    def __init__(
        self, tokenizer: Tokenizer, tool_parser: str = "auto", reasoning_parser: str = "auto"
    ) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self._style = style_of(template, tool_parser)
        self.thinks = reasoning.thinks(template, reasoning_parser)
        self.switches_thinking = "enable_thinking" in (template or "")
        self._knows_tools = bool(re.search(r"\btools\b", template or ""))

    def line(self) -> str:
        """What was decided, for people."""
        calls = "none" if self._style is None else self._style.name
        if self._style is not None and not self._knows_tools:
            calls += " (told in the system message)"
        return f"tool calls {calls}, reasoning {'think' if self.thinks else 'none'}"

    def prompt(self, asked: Conversation, content: StructuredOutput | None = None) -> ChatPrompt:
        """The prompt of a conversation whose answer, if it is no call, must be `content`.

        Raises TemplateRefusal, or ValueError naming the field that makes no sense here.
        """
        tools = asked.toolset.tools if asked.toolset.choice != "none" else ()
        if tools and self._style is None:
            raise ValueError("tools are not served here: the tool parser is none")
        try:
            text = self._render(asked, [tool.described() for tool in tools] or None)
        except ValueError as error:
            raise TemplateRefusal(str(error)) from None
        except RecursionError:
            raise TemplateRefusal("a message is nested too deep") from None
        thought = self._thought(asked, text)
        structured = self._structured(asked.toolset, content, thought)
        return ChatPrompt(
            ids=self._tokenizer.encode(text, add_special_tokens=False),
            structured=structured,
            reader=self._reader(asked.toolset, thought, structured),
            shows_special=self._shows_special(bool(tools), thought),
        )

    # ── what the model reads ────────────────────────────────────────────────────────────────────

    def _render(self, asked: Conversation, tools: list[dict[str, Any]] | None) -> str:
        messages = [_for_template(message) for message in asked.messages]
        if not self._knows_tools:
            messages = [_plain(message, self._style) for message in messages]
            if tools and self._style is not None:
                told = instructions(asked.toolset.tools, self._style)
                messages = _told(messages, told, self._takes_system)
            messages = _merged_results(messages)
            tools = None
        elif self._style is not None and self._style.one_by_one:
            messages = _one_by_one(messages)
        generation = asked.add_generation_prompt and not asked.continue_final_message
        if not asked.continue_final_message:
            return self._tokenizer.render_chat(messages, generation, tools, **asked.template_kwargs)
        # What follows the last message's content in the template is cut off: the end of its turn.
        mark = f"[{uuid.uuid4().hex}]"
        last = {**messages[-1], "content": f"{messages[-1].get('content') or ''}{mark}"}
        text = self._tokenizer.render_chat(
            [*messages[:-1], last], generation, tools, **asked.template_kwargs
        )
        if mark not in text:
            raise ValueError("continue_final_message: the template does not show the last message")
        return text[: text.rindex(mark)]

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows a system message; some refuse it, some forget it."""
        mark = uuid.uuid4().hex
        messages = [{"role": "system", "content": mark}, {"role": "user", "content": "."}]
        try:
            return mark in self._tokenizer.render_chat(messages)
        except ValueError:
            return False

    # ── what the model writes ───────────────────────────────────────────────────────────────────

    def _thought(self, asked: Conversation, text: str) -> Thought | None:
        """Whether the answer goes on with a thought, or may begin with one."""
        if not self.thinks:
            return None
        if asked.continue_final_message and asked.messages:
            said = asked.messages[-1].get("content") or ""
            opened = said.rfind(reasoning.OPEN) > said.rfind(reasoning.CLOSE)
            if said:
                return "opened" if opened else None
        end = text.rstrip()
        if end.endswith(reasoning.OPEN):
            return "opened"
        return None if end.endswith(reasoning.CLOSE) else "optional"

    def _structured(
        self, toolset: Toolset, content: StructuredOutput | None, thought: Thought | None
    ) -> StructuredOutput | None:
        tools = toolset.callable
        strict = any(tool.strict for tool in tools) or not toolset.parallel
        if tools and self._style and (toolset.must_call or strict or content is not None):
            source = "tool_choice" if toolset.must_call else "tools"
            text = tool_grammar(self._style, toolset, content, thought, self._literal)
            return StructuredOutput(grammar=text, source=source)
        if content is None or thought is None:
            return content
        if thought == "optional" and content.kind == "grammar":
            return content
        text = content_grammar(content, thought, self._literal)
        return StructuredOutput(grammar=text, source=content.source)

    def _reader(
        self, toolset: Toolset, thought: Thought | None, structured: StructuredOutput | None
    ) -> Callable[[], Reader] | None:
        names = frozenset(tool.name for tool in toolset.callable)
        style = self._style
        if style is not None and structured is not None and style.write.open:
            style = replace(style, at_start=())  # calls are where the grammar puts them

        calls: Callable[[], Reader] | None = None
        if style is not None and names:
            calls = partial(ToolReader, style, names, toolset.must_call)
        if thought is None:
            return calls
        return lambda: ThinkReader(thought == "opened", calls() if calls is not None else None)

    def _shows_special(self, tools: bool, thought: Thought | None) -> bool:
        markers = [reasoning.OPEN, reasoning.CLOSE] if thought else []
        if tools and self._style is not None:
            markers += [text for marker in self._style.anywhere for text in marker if text]
        return any(self._special_id(marker) is not None for marker in markers)

    def _special_id(self, marker: str) -> int | None:
        ids = self._tokenizer.encode(marker, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and ids[0] in self._tokenizer.special_ids else None

    def _literal(self, marker: str) -> str:
        """A marker in Lark: by its id if it is a special token, else as quoted text."""
        id = self._special_id(marker)
        return json.dumps(marker, ensure_ascii=False) if id is None else f"<[{id}]>"


def _for_template(message: Message) -> Message:
    """As chat templates expect it: `developer` is `system`, arguments are objects."""
    message = {name: value for name, value in message.items() if value is not None}
    if message["role"] == "developer":
        message["role"] = "system"
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call)}} for call in calls
        ]
    message.setdefault("content", "")
    return message


def _object(call: Mapping[str, Any]) -> Any:
    """A call's arguments as an object; as the text they are if that is not one."""
    text = call["function"]["arguments"]
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Each call in a message of its own, its result behind it."""
    split: list[Message] = []
    results: list[Message] = []  # of the calls before, in the order of the calls
    for message in messages:
        if message["role"] == "tool":
            results.append(message)
            continue
        _place(split, results)
        results = []
        calls = message.get("tool_calls", ())
        for i, call in enumerate(calls):
            said = "" if i else message["content"]
            split.append({**message, "content": said, "tool_calls": [call]})
        if not calls:
            split.append(message)
    _place(split, results)
    return split


def _place(messages: list[Message], results: Sequence[Message]) -> None:
    """Put each result behind its call at the end of `messages`, what answers none behind all."""
    of_call: dict[Any, list[Message]] = {}
    for result in results:
        of_call.setdefault(result.get("tool_call_id"), []).append(result)
    calls: list[Message] = []
    while results and messages and "tool_calls" in messages[-1]:
        calls.append(messages.pop())
    for call in reversed(calls):
        messages += [call, *of_call.pop(call["tool_calls"][0]["id"], ())]
    for rest in of_call.values():
        messages += rest


def _plain(message: Message, style: Style | None) -> Message:
    """Calls and their results as text, for templates that know neither."""
    if message["role"] == "tool":
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": result, "tool_call_id": message.get("tool_call_id")}
    calls = message.pop("tool_calls", None)
    if not calls or style is None:
        return message
    opening, closing = style.write
    written = [f"{opening}{_written(call['function'], style.arguments)}{closing}" for call in calls]
    said = [message["content"]] if message["content"] else []
    return {**message, "content": "\n".join([*said, style.between.join(written)])}


def _written(function: Mapping[str, Any], arguments: str) -> str:
    call = {"name": function["name"], arguments: function["arguments"]}
    return json.dumps(call, ensure_ascii=False)


def _merged_results(messages: Sequence[Message]) -> list[Message]:
    """Results of calls that follow each other as one turn of the user."""
    merged: list[Message] = []
    before = False
    for message in messages:
        result = "tool_call_id" in message
        message = {name: value for name, value in message.items() if name != "tool_call_id"}
        if result and before:
            merged[-1]["content"] += f"\n{message['content']}"
        else:
            merged.append(message)
        before = result
    return merged


def _told(messages: Sequence[Message], told: str, takes_system: bool) -> list[Message]:
    """`told` behind what the system message says, or before what the user says first."""
    role = "system" if takes_system else "user"
    at = next((i for i, message in enumerate(messages) if message["role"] == role), None)
    if at is None or (takes_system and at > 0):
        return [{"role": role, "content": told}, *messages]
    said = messages[at]["content"]
    texts = [said, told] if takes_system else [told, said]
    return [*messages[:at], {**messages[at], "content": "\n\n".join(texts)}, *messages[at + 1 :]]
