"""`/v1/responses` with the official client: items, their events, and what goes back in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.fake_engine import SAYS, FakeEngine
from tests.server.live import serving

THOUGHT_AND_CALLS = (
    "<think>\nIt asks for two.\n</think>\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen"}}\n</tool_call>'
)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}


class Thinker(FakeEngine):
    """Its template knows thoughts and calls, and it thinks and calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer.chat_template = "tools <tool_call> <think></think> enable_thinking"
        self.says = THOUGHT_AND_CALLS


def client_of(url: str) -> openai.OpenAI:
    http_client = httpx.Client(trust_env=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http_client
    )


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with serving(engine) as url:
        yield client_of(url)


@pytest.fixture(scope="module")
def thinker() -> Iterator[tuple[openai.OpenAI, Thinker]]:
    engine = Thinker()
    with serving(engine) as url:
        yield client_of(url), engine


def prompt_of(engine: FakeEngine, id: str) -> str:
    return bytes(engine.prompts[id]).decode()


def test_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    reply = client.responses.create(
        model="fake", input="Hi", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5
    )
    assert reply.output_text == SAYS
    assert reply.status == "completed" and reply.error is None
    assert reply.id.startswith("resp-") and reply._request_id == reply.id
    (item,) = reply.output
    assert item.type == "message" and item.status == "completed"
    assert prompt_of(engine, reply.id) == "<system>Be brief.\n<user>Hi\n<assistant>"
    assert reply.metadata == {"a": "b"} and reply.instructions == "Be brief."
    assert engine.params is not None and engine.params.temperature == reply.temperature == 0.5
    usage = reply.usage
    assert usage is not None and usage.output_tokens == len(SAYS.encode())
    assert usage.input_tokens_details.cached_tokens == 2
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_cut_short_is_incomplete(client: openai.OpenAI) -> None:
    reply = client.responses.create(model="fake", input="Hi", max_output_tokens=5)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_events_of_text_in_order(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(model="fake", input="Hi", max_output_tokens=3, stream=True)
    )
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 2,
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, last = events[0], events[-1]
    assert first.type == "response.created" and first.response.status == "in_progress"
    assert first.response.output == [] and first.response.usage is None
    assert last.type == "response.incomplete" and last.response.usage is not None
    assert last.response.usage.output_tokens == 3


def test_thought_text_and_calls(thinker: tuple[openai.OpenAI, Thinker]) -> None:
    client, _ = thinker
    reply = client.responses.create(model="fake", input="Both?", tools=[WEATHER])
    thought, said, *calls = reply.output
    assert thought.type == "reasoning" and thought.content is not None
    assert thought.content[0].text == "It asks for two."
    assert said.type == "message" and reply.output_text == "I look."
    for call, city in zip(calls, ("Oslo", "Bergen"), strict=True):
        assert call.type == "function_call" and call.name == "weather"
        assert json.loads(call.arguments) == {"city": city}
        assert call.call_id.startswith("call_")
    assert reply.usage is not None
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens
    assert reply.tools[0].type == "function" and reply.status == "completed"


def test_a_call_in_which_the_answer_stops_is_not_complete(
    thinker: tuple[openai.OpenAI, Thinker], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, engine = thinker
    monkeypatch.setattr(engine, "says", engine.says[: engine.says.rindex("}\n</tool_call>")])
    reply = client.responses.create(model="fake", input="Both?", tools=[WEATHER])
    *_, first, last = (item for item in reply.output if item.type == "function_call")
    assert (first.status, last.status, reply.status) == ("completed", "incomplete", "completed")


def test_streamed_items_are_the_whole_ones(thinker: tuple[openai.OpenAI, Thinker]) -> None:
    """The client's own accumulator puts the events together."""
    client, _ = thinker
    kinds: list[str] = []
    with client.responses.stream(model="fake", input="Both?", tools=[WEATHER]) as stream:
        for event in stream:
            if not kinds or kinds[-1] != event.type:
                kinds.append(event.type)
        streamed = stream.get_final_response()
    whole = client.responses.create(model="fake", input="Both?", tools=[WEATHER])

    def plain(reply: Any) -> Any:
        shown = {"type", "content", "name", "arguments", "status", "role", "summary"}
        return [
            {k: v for k, v in item.items() if k in shown and v is not None}
            for item in json.loads(reply.model_dump_json(exclude={"output": {"__all__": {"id"}}}))[
                "output"
            ]
        ]

    assert [item.type for item in streamed.output] == [item.type for item in whole.output]
    assert streamed.output_text == whole.output_text
    assert plain(whole)[2]["arguments"] == plain(streamed)[2]["arguments"]
    added, part = "response.output_item.added", "response.content_part.added"
    part_done, done = "response.content_part.done", "response.output_item.done"
    call = [
        added,
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        done,
    ]
    assert kinds == [
        *("response.created", "response.in_progress"),
        *(added, part, "response.reasoning_text.delta", "response.reasoning_text.done"),
        *(part_done, done),
        *(added, part, "response.output_text.delta", "response.output_text.done"),
        *(part_done, done),
        *call,
        *call,
        "response.completed",
    ]


def test_what_came_out_goes_back_in(thinker: tuple[openai.OpenAI, Thinker]) -> None:
    client, engine = thinker
    first = client.responses.create(model="fake", input="Both?", tools=[WEATHER])
    told: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Both?"}]}]
    told += [item.model_dump(exclude_none=True) for item in first.output]
    for item in first.output:
        if item.type == "function_call":
            told.append({"type": "function_call_output", "call_id": item.call_id, "output": "rain"})
    told.append({"role": "developer", "content": "Be brief."})
    second = client.responses.create(model="fake", input=told, tools=[WEATHER])
    rows = prompt_of(engine, second.id).split("\n<")
    assert [row.split(">")[0].lstrip("<") for row in rows] == [
        *("user", "assistant", "tool", "tool", "system", "assistant")
    ]
    assert rows[1] == "assistant>I look."


def test_fields_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.responses.create(
        model="fake",
        input="Hi",
        top_p=0.5,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        extra_body={"top_k": 3, "seed": 4, "cache_salt": "s", "priority": 2, "min_p": 0.25},
    )
    params = engine.params
    assert params is not None and params.structured is not None
    assert (params.top_p, params.top_k, params.seed, params.min_p) == (0.5, 3, 4, 0.25)
    assert params.structured.json_schema == '{"type": "object"}'
    assert engine.priority == 2 and "s" in engine.namespace


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.responses.create(
        model="fake",
        input="Hi",
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    (item,) = reply.output
    assert item.type == "message" and item.content[0].type == "output_text"
    scores = item.content[0].logprobs
    assert scores is not None and len(scores) == 4
    assert [top.logprob for top in scores[0].top_logprobs] == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 9e9, "top_p": 2}, "top_p"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, None),
        ({"input": []}, "input"),
        ({"input": "x" * 5000}, "input"),
    ],
)
def test_what_is_not_done_is_named(
    client: openai.OpenAI, extra: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "fake", "input": "Hi", **extra})
    assert caught.value.param == param or (param is None and caught.value.param)


def test_failures(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="NaN in 1 row"):
        client.responses.create(model="fake", input="fail-first", stream=True)
    events = list(client.responses.create(model="fake", input="fail-later", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.message == "NaN in 1 row"
