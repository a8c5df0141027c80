"""OpenAI's messages and tools, as a chat route's body has them, into a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from astrai.server.chat.format import Conversation
from astrai.server.chat.tools import Tool, Toolset
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import Body, screen, short, text_of

# Known but not done: 400, unless null or one of the values that say nothing.
REFUSED_MESSAGE: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "annotations": ([],),
}


class CalledFunction(Body):
    name: str
    arguments: str


class MessageCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of a streamed delta that came back as it was


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionBody(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


Messages = Annotated[list[Message], Field(min_length=1)]
ToolChoice = str | dict[str, Any]


def screened(messages: Any) -> Any:
    """Messages with their content as one string; ApiError names what is refused or unknown.

    What is no list of objects is left to the model to refuse.
    """
    if not isinstance(messages, list):
        return messages
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, at: str) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") == "function":
        raise ApiError(
            f"{at}.role: 'function' is not implemented, use 'tool'",
            param=f"{at}.role",
            code="not_implemented",
        )
    fields = screen(message, Message, frozenset(), REFUSED_MESSAGE, at=f"{at}.")
    if isinstance(fields.get("content"), list):
        fields["content"] = text_of(fields["content"], f"{at}.content", ("text",), frozenset())
    elif fields.get("content") is None and not fields.get("tool_calls"):
        raise ApiError(f"{at}.content is required", param=f"{at}.content")
    for name, role in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if fields.get(name) and fields.get("role") != role:
            raise ApiError(
                f"{at}.{name} in a message of role {short(fields.get('role'))}, expected {role!r}",
                param=f"{at}.{name}",
            )
    if fields.get("role") == "tool" and not fields.get("tool_call_id"):
        raise ApiError(f"{at}.tool_call_id is required", param=f"{at}.tool_call_id")
    return fields


def conversation(
    messages: Sequence[Message],
    *,
    toolset: Toolset,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    template_kwargs: Mapping[str, Any],
) -> Conversation:
    """ApiError if the last message is to be continued and cannot be."""
    if continue_final_message:
        if add_generation_prompt:
            raise ApiError(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        if messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise ApiError(
                f"continue_final_message: the last message is of role {messages[-1].role!r} with "
                f"{len(messages[-1].tool_calls or ())} tool calls, expected 'assistant' with none",
                param="continue_final_message",
            )
    return Conversation(
        messages=[_plain(message) for message in messages],
        toolset=toolset,
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs,
    )


def _plain(message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    for call in plain.get("tool_calls", ()):
        call.pop("index", None)
    return plain


def toolset(
    tools: Sequence[ToolBody] | None, choice: ToolChoice | None, parallel: bool | None
) -> Toolset:
    """The tools that a request offers; ApiError names the one that is wrong."""
    offered = tuple(_tool(tool.function, f"tools[{i}]") for i, tool in enumerate(tools or ()))
    named = _named(choice) if isinstance(choice, dict) else None
    if choice is None:
        kind: Any = "auto"
    elif isinstance(choice, dict):
        kind = "named"
    elif choice in ("auto", "none", "required"):
        kind = choice
    else:
        raise ApiError(
            f"tool_choice = {short(choice)}, expected 'auto', 'none', 'required' or a function",
            param="tool_choice",
        )
    try:
        return Toolset(offered, kind, named, parallel is not False)
    except ValueError as error:
        message = str(error)
        raise ApiError(message, param=message.split()[0]) from None


def _tool(function: FunctionBody, at: str) -> Tool:
    try:
        return Tool(
            function.name,
            function.description or "",
            function.parameters,
            bool(function.strict),
        )
    except ValueError as error:
        field = f"{at}.function.{str(error).split(maxsplit=1)[0]}"
        raise ApiError(f"{at}.function.{error}", param=field) from None


def _named(choice: Mapping[str, Any]) -> str:
    if choice.get("type") != "function":
        raise ApiError(
            f"tool_choice.type = {short(choice.get('type'))} is not implemented, only 'function'",
            param="tool_choice.type",
            code="not_implemented",
        )
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or set(choice) != {"type", "function"} or len(function or ()) != 1:
        raise ApiError(
            f"tool_choice = {short(dict(choice))}, "
            "expected {'type': 'function', 'function': {'name': …}}",
            param="tool_choice",
        )
    return name
