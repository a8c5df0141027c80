"""What is asked, as token ids: a conversation through the chat template, texts as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from astrai.server import openai
from astrai.server.edge import off_loop
from astrai.server.errors import ApiError

if TYPE_CHECKING:
    from astrai.models.tokenizer import Tokenizer


async def chat_ids(tokenizer: Tokenizer, asked: openai.ChatRequest) -> list[int]:
    """ApiError 400 if the model has no chat template, or if it refuses the conversation."""
    if not tokenizer.has_chat_template:
        raise ApiError("the model has no chat template: use /v1/completions", param="messages")
    messages = openai.template_messages(asked)
    generation = True if asked.add_generation_prompt is None else asked.add_generation_prompt
    kwargs = asked.chat_template_kwargs or {}

    def render() -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, **kwargs)

    try:
        return await off_loop(sum(len(m["content"]) for m in messages), render)
    except ValueError as error:
        message = f"the chat template refuses these messages: {error}"
        raise ApiError(message, param="messages", code="chat_template_error") from None


async def prompt_ids(tokenizer: Tokenizer, asked: openai.CompletionRequest) -> list[list[int]]:
    """One list per prompt: a text, token ids, or a list of either."""
    special = True if asked.add_special_tokens is None else asked.add_special_tokens
    prompt = asked.prompt
    one = isinstance(prompt, str) or _is_ids(prompt)
    items: Sequence[Any] = [prompt] if one else prompt

    def encode() -> list[list[int]]:
        return [
            tokenizer.encode(item, add_special_tokens=special) if isinstance(item, str) else item
            for item in items
        ]

    return await off_loop(sum(len(i) for i in items if isinstance(i, str)), encode)


def _is_ids(prompt: Sequence[Any]) -> TypeGuard[list[int]]:
    return isinstance(prompt[0], int)
