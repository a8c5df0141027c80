"""Each field that an official client can send is implemented, harmless or refused."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from astrai.server.dialects import anthropic, embeddings, openai, responses, tokens
from astrai.server.http.fields import Lists

# What clients of other servers send beside them.
EXTRAS = """top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids bad_words
    prompt_logprobs skip_special_tokens include_stop_str_in_output spaces_between_special_tokens
    cache_salt priority request_id timeout truncate_prompt_tokens allowed_token_ids length_penalty
    use_beam_search return_token_ids return_tokens_as_token_ids logits_processors
    kv_transfer_params structured_outputs guided_json guided_regex guided_choice guided_grammar
    response_format add_special_tokens prompt_embeds"""
CHAT_EXTRAS = """chat_template_kwargs chat_template continue_final_message add_generation_prompt
    documents include_reasoning mm_processor_kwargs"""
EMBEDDING_EXTRAS = """truncate_prompt_tokens add_special_tokens priority request_id cache_salt
    normalize pooling timeout"""
SHARED_EXTRAS = """min_p seed repetition_penalty min_tokens ignore_eos stop_token_ids
    chat_template_kwargs cache_salt priority request_id timeout"""

ROUTES: list[tuple[type[Any], Lists, list[type[Any]], str]] = [
    (
        openai.ChatRequest,
        openai.CHAT,
        [
            chat_create_params.CompletionCreateParamsNonStreaming,
            chat_create_params.CompletionCreateParamsStreaming,
        ],
        f"{EXTRAS} {CHAT_EXTRAS}",
    ),
    (
        openai.CompletionRequest,
        openai.COMPLETION,
        [
            completion_create_params.CompletionCreateParamsNonStreaming,
            completion_create_params.CompletionCreateParamsStreaming,
        ],
        EXTRAS,
    ),
    (
        embeddings.EmbeddingRequest,
        embeddings.LISTS,
        [embedding_create_params.EmbeddingCreateParams],
        EMBEDDING_EXTRAS,
    ),
    (
        responses.ResponseRequest,
        responses.LISTS,
        [
            response_create_params.ResponseCreateParamsNonStreaming,
            response_create_params.ResponseCreateParamsStreaming,
        ],
        f"{SHARED_EXTRAS} top_k presence_penalty frequency_penalty",
    ),
    (
        anthropic.MessagesRequest,
        anthropic.LISTS,
        [
            message_create_params.MessageCreateParamsNonStreaming,
            message_create_params.MessageCreateParamsStreaming,
            beta_message_create_params.MessageCreateParamsNonStreaming,
        ],
        SHARED_EXTRAS,
    ),
    (
        anthropic.CountRequest,
        anthropic.LISTS,
        [message_count_tokens_params.MessageCountTokensParams],
        "",
    ),
    (tokens.TokenizeRequest, tokens.LISTS, [], "add_special_tokens return_token_strs tools"),
    (tokens.DetokenizeRequest, tokens.LISTS, [], ""),
]
IN_HEADERS = {"betas"}


def fields_of(params: type[Any]) -> set[str]:
    """Of a TypedDict and those it was made of."""
    return set(params.__annotations__) - IN_HEADERS


@pytest.mark.parametrize(("model", "lists", "official", "extras"), ROUTES)
def test_every_field_is_in_one_list(
    model: Any, lists: Lists, official: list[type[Any]], extras: str
) -> None:
    known = [set(model.model_fields), set(lists.harmless), set(lists.refused)]
    assert sum(map(len, known)) == len(set.union(*known)), "a field is in two lists"
    asked = set(extras.split()).union(*map(fields_of, official))
    assert len(asked) >= len(extras.split())
    assert asked - set.union(*known) == set()


def test_the_clients_are_read() -> None:
    """TypedDicts of streaming and not inherit their fields: the walk above must see those."""
    fields = fields_of(chat_create_params.CompletionCreateParamsStreaming)
    assert {"messages", "tools", "temperature", "stream"} <= fields
