"""What is asked, as token ids: a conversation through the chat template, texts as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from astrai.server.chat.format import ChatFormat, ChatPrompt, Conversation, TemplateRefusal
from astrai.server.chat.parts import Reader
from astrai.server.chat.timebox import OutOfTime, timeboxed
from astrai.server.dialects import openai
from astrai.server.dialects.replies import Echo
from astrai.server.edge import Call, off_loop
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import blame

if TYPE_CHECKING:
    from astrai.front.structured import StructuredOutput
    from astrai.models.tokenizer import Tokenizer

# Time for the template; and what a slow tokenizer does with its text.
TEMPLATE_SECONDS = 5.0
_CHARACTERS_A_SECOND = 200_000

Prompts: TypeAlias = str | list[str] | list[int] | list[list[int]]


class Asked(NamedTuple):
    """A request of a chat, ready for the engine."""

    call: Call
    ids: list[int]
    reader: Callable[[], Reader] | None  # makes what reads a choice's text; None: all is said


async def chat_asked(chat_format: ChatFormat, request: openai.ChatRequest) -> Asked:
    """ApiError as of what is wrong with its fields, or with the conversation."""
    call = openai.chat_call(request)
    talk = openai.chat_conversation(request)
    prompt = await chat_prompt(chat_format, talk, call.params.structured)
    call = call._replace(params=prompt.applied(call.params))
    return Asked(call, prompt.ids, prompt.reader)


async def chat_prompt(
    chat_format: ChatFormat, asked: Conversation, content: StructuredOutput | None = None
) -> ChatPrompt:
    """ApiError 400 if the model has no chat template, or if it refuses the conversation.

    A template is a program that came with the model, and what it does with these messages is not
    known: it never runs on the event loop, nor without end.
    """
    seconds = TEMPLATE_SECONDS + asked.n_characters / _CHARACTERS_A_SECOND
    try:
        return await timeboxed(lambda: chat_format.prompt(asked, content), seconds)
    except TemplateRefusal as error:
        message = f"the chat template refuses these messages: {error}"
        raise ApiError(message, param="messages", code="chat_template_error") from None
    except OutOfTime:
        raise ApiError(
            f"the chat template took more than {seconds:.1f} s for these messages",
            param="messages",
            code="chat_template_error",
        ) from None
    except ValueError as error:
        raise blame(error) from None


async def encoded(
    tokenizer: Tokenizer, prompt: Prompts, add_special_tokens: bool | None
) -> list[list[int]]:
    """One list per prompt; `add_special_tokens` None is what tokenizers do by themselves: yes."""
    special = True if add_special_tokens is None else add_special_tokens
    items = _items(prompt)

    def encode() -> list[list[int]]:
        return [
            tokenizer.encode(item, add_special_tokens=special) if isinstance(item, str) else item
            for item in items
        ]

    return await off_loop(sum(len(i) for i in items if isinstance(i, str)), encode)


def echoed(tokenizer: Tokenizer, asked: openai.CompletionRequest, prompts: list[list[int]]) -> Echo:
    """The prompts as the request wrote them; token ids as the text they stand for."""
    texts = [
        item
        if isinstance(item, str)
        else b"".join(map(tokenizer.token_bytes, item)).decode("utf-8", errors="replace")
        for item in _items(asked.prompt)
    ]
    return Echo(list(zip(texts, prompts)), asked.n or 1, asked.prompt_logprobs)


def _items(prompt: Prompts) -> list[Any]:
    """The prompts one by one, each a text or token ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt
