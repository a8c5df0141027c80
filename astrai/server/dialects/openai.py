"""OpenAI's request bodies: which fields are done, which have no effect, which are refused by name.

The model's fields and the two lists of a route are the whole policy: a field that is in none of
the three is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from astrai.front.sampling_params import SamplingParams
from astrai.server.chat.format import Conversation
from astrai.server.chat.structured import StructuredFields, structured_of
from astrai.server.dialects.messages import (
    Messages,
    ToolBody,
    ToolChoice,
    conversation,
    screened,
    toolset,
)
from astrai.server.edge import Call
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import Body, EngineFields, Lists, blame, screen, validate

_HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
    }
)

_REFUSED_BOTH: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "kv_transfer_params": (),
}
_REFUSED_CHAT: dict[str, tuple[Any, ...]] = {
    **_REFUSED_BOTH,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"], []),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),
    "include_reasoning": (True,),
    "mm_processor_kwargs": (),
}
_REFUSED_COMPLETION: dict[str, tuple[Any, ...]] = {
    **_REFUSED_BOTH,
    "suffix": ("",),
    "best_of": (1,),
}
CHAT = Lists(_HARMLESS, _REFUSED_CHAT)
COMPLETION = Lists(_HARMLESS, _REFUSED_COMPLETION)
_HARMLESS_STREAM_OPTIONS = frozenset({"include_obfuscation"})
_REFUSED_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"continuous_usage_stats": (False,)}

# Keyword arguments of the template call that belong to the request's own fields.
_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "chat_template",
    }
)


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingFields(EngineFields):
    """Of sampling, what is called and means the same on every route that samples, also where the
    API that the route speaks does not have it. The names are those of `SamplingParams`."""

    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None


class _Request(StructuredFields, SamplingFields):
    """The implemented fields of both routes."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(_Request):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


def _screen(body: Mapping[str, Any], model: type[Body], lists: Lists) -> dict[str, Any]:
    fields = screen(body, model, *lists)
    options = fields.get("stream_options")
    if isinstance(options, dict):
        fields["stream_options"] = screen(
            options,
            StreamOptions,
            _HARMLESS_STREAM_OPTIONS,
            _REFUSED_STREAM_OPTIONS,
            at="stream_options.",
        )
    return fields


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    fields = _screen(body, ChatRequest, CHAT)
    if "messages" in fields:
        fields["messages"] = screened(fields["messages"])
    request = validate(ChatRequest, fields)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    limits = (request.max_tokens, request.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise ApiError(
            f"max_tokens = {limits[0]} and max_completion_tokens = {limits[1]} disagree",
            param="max_completion_tokens",
        )
    for key in request.chat_template_kwargs or ():
        if key in _RESERVED_TEMPLATE_KWARGS:
            raise ApiError(
                f"chat_template_kwargs.{key} is reserved", param=f"chat_template_kwargs.{key}"
            )
    return request


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    fields = _screen(body, CompletionRequest, COMPLETION)
    request = validate(CompletionRequest, fields)
    if len(request.prompt) == 0 or (
        isinstance(request.prompt, list) and any(p in ("", []) for p in request.prompt)
    ):
        raise ApiError("prompt is empty", param="prompt", code="empty_prompt")
    return request


def chat_call(request: ChatRequest) -> Call:
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = request.max_tokens
    if request.max_completion_tokens is not None:
        limit = request.max_completion_tokens
    return _call(request, max_tokens=limit, logprobs=logprobs)


def completion_call(request: CompletionRequest) -> Call:
    limit = 16 if request.max_tokens is None else request.max_tokens
    call = _call(request, max_tokens=limit, logprobs=request.logprobs, echo=bool(request.echo))
    if limit == 0 and not request.echo and request.prompt_logprobs is None:
        raise ApiError("max_tokens = 0, expected >= 1 without echo", param="max_tokens")
    return call


def chat_conversation(request: ChatRequest) -> Conversation:
    return conversation(
        request.messages,
        toolset=toolset(request.tools, request.tool_choice, request.parallel_tool_calls),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=request.chat_template_kwargs or {},
    )


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def _call(
    request: _Request, *, max_tokens: int | None, logprobs: int | None, echo: bool = False
) -> Call:
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options needs stream: true", param="stream_options")
    given = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    if echo and (logprobs is not None or max_tokens == 0):
        given["prompt_logprobs"] = max(logprobs or 0, request.prompt_logprobs or 0)
    try:
        params = SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, structured=structured_of(request), **given
        )
    except ValueError as error:
        raise blame(error) from None
    return Call(
        params=params,
        priority=request.priority or 0,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        cache_salt=request.cache_salt,
        request_id=request.request_id,
        timeout=request.timeout,
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    read: dict[int, float] = {}
    for token, value in bias.items():
        try:
            read[int(token)] = value
        except ValueError:
            raise ApiError(
                f"logit_bias: {token!r} is not a token id", param=f"logit_bias.{token}"
            ) from None
    return read
