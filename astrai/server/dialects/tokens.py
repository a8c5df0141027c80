"""`/tokenize` and `/detokenize`: a text or a conversation as token ids, and back."""

from __future__ import annotations

from typing import Any

from astrai.server.dialects import openai
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import Body, Lists, parse

# A conversation is tokenized as /v1/chat/completions would: these are its fields.
_CHAT_FIELDS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
)

LISTS = Lists(
    harmless=frozenset({"user"}),
    refused={"chat_template": (), "documents": ([],), "reasoning_effort": ()},
)


class TokenizeRequest(Body):
    """A `prompt`, or `messages` with what a chat request says of them: exactly one of the two."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


def parse_tokenize(body: dict[str, Any]) -> tuple[TokenizeRequest, openai.ChatRequest | None]:
    """The request, and the conversation in it if it has one."""
    request = parse(body, TokenizeRequest, LISTS)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("expected exactly one of prompt and messages", param="prompt")
    if request.messages is None:
        return request, None
    if request.add_special_tokens is not None:
        raise ApiError("add_special_tokens needs prompt", param="add_special_tokens")
    chat = {name: body[name] for name in _CHAT_FIELDS if body.get(name) is not None}
    return request, openai.parse_chat(chat)


def parse_detokenize(body: dict[str, Any], vocab_size: int) -> DetokenizeRequest:
    request = parse(body, DetokenizeRequest, LISTS)
    for i, token in enumerate(request.tokens):
        if not 0 <= token < vocab_size:
            raise ApiError(
                f"tokens[{i}] = {token}, expected 0 <= token < {vocab_size}", param="tokens"
            )
    return request
