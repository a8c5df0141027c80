"""`/v1/messages` with the official client: blocks, their events, and what goes back in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import httpx2
import pytest

from tests.server.dialects.test_responses import Thinker, prompt_of
from tests.server.fake_engine import SAYS, FakeEngine
from tests.server.live import serving

HI: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
CALL: Any = {"type": "tool_use", "id": "c", "name": "weather", "input": {}}


def client_of(url: str) -> anthropic.Anthropic:
    http_client = httpx2.Client(trust_env=False)
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, http_client=http_client)


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[anthropic.Anthropic]:
    with serving(engine) as url:
        yield client_of(url)


@pytest.fixture(scope="module")
def thinker() -> Iterator[tuple[anthropic.Anthropic, Thinker]]:
    engine = Thinker()
    with serving(engine) as url:
        yield client_of(url), engine


def test_text(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    reply = client.messages.create(
        model="fake",
        max_tokens=1000,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        extra_body={"temperature": 0.5, "top_k": 7},
        stop_sequences=["END"],
        metadata={"user_id": "me"},
    )
    (block,) = reply.content
    assert block.type == "text" and block.text == SAYS
    assert reply.stop_reason == "end_turn" and reply.stop_sequence is None
    assert reply._request_id == reply.id
    assert prompt_of(engine, reply.id) == "<system>Be brief.\n<user>Hi\n<assistant>"
    params = engine.params
    assert params is not None
    assert (params.temperature, params.top_k, params.stop) == (0.5, 7, ("END",))
    usage = reply.usage
    assert usage.cache_read_input_tokens == 2 and usage.output_tokens == len(SAYS.encode())
    n_prompt = len(engine.prompts[reply.id])
    assert usage.input_tokens + usage.cache_read_input_tokens == n_prompt


def test_cut_short(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(model="fake", max_tokens=3, messages=HI)
    assert reply.stop_reason == "max_tokens" and reply.usage.output_tokens == 3


def test_events_in_order(client: anthropic.Anthropic) -> None:
    events: list[Any] = list(
        client.messages.create(model="fake", max_tokens=2, messages=HI, stream=True)
    )
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, delta = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None and start.usage.input_tokens > 0
    assert delta.delta.stop_reason == "max_tokens" and delta.usage.output_tokens == 2


def test_the_wire_has_names_and_pings(http: httpx.Client) -> None:
    body = {"model": "fake", "max_tokens": 1, "messages": HI, "stream": True}
    response = http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})
    assert response.headers["content-type"].startswith("text/event-stream")
    names = [line for line in response.text.split("\n") if line.startswith("event: ")]
    assert names[:3] == ["event: message_start", "event: ping", "event: content_block_start"]


def test_thought_text_and_calls(thinker: tuple[anthropic.Anthropic, Thinker]) -> None:
    client, _ = thinker
    whole = client.messages.create(model="fake", max_tokens=999, messages=HI, tools=[WEATHER])
    with client.messages.stream(
        model="fake", max_tokens=999, messages=HI, tools=[WEATHER]
    ) as stream:
        streamed = stream.get_final_message()
    for reply in (whole, streamed):
        blocks: list[Any] = list(reply.content)
        assert [block.type for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
        assert blocks[0].thinking == "It asks for two."
        assert blocks[1].text == "I look."
        assert [block.input for block in blocks[2:]] == [{"city": "Oslo"}, {"city": "Bergen"}]
        assert blocks[2].id != blocks[3].id and blocks[2].name == "weather"
        assert reply.stop_reason == "tool_use"


def test_an_answer_that_stops_in_a_call_made_none(
    thinker: tuple[anthropic.Anthropic, Thinker], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, engine = thinker
    monkeypatch.setattr(engine, "says", engine.says[: engine.says.rindex("}\n</tool_call>")])
    asked: Any = {"model": "fake", "max_tokens": 999, "messages": HI, "tools": [WEATHER]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert whole.stop_reason == streamed.stop_reason == "end_turn"


def test_what_came_out_goes_back_in(thinker: tuple[anthropic.Anthropic, Thinker]) -> None:
    client, engine = thinker
    first = client.messages.create(model="fake", max_tokens=999, messages=HI, tools=[WEATHER])
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "rain", "is_error": i == 0}
        for i, block in enumerate(b for b in first.content if b.type == "tool_use")
    ]
    second = client.messages.create(
        model="fake",
        max_tokens=9,
        tools=[WEATHER],
        messages=[
            *HI,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
        ],
    )
    text = prompt_of(engine, second.id)
    assert "<user>Hi\n<assistant>I look." in text
    assert "<tool>Error: rain\n<tool>rain\n<user>So?" in text


def test_an_answer_that_was_begun_is_gone_on_with(
    client: anthropic.Anthropic, engine: FakeEngine
) -> None:
    begun: Any = [*HI, {"role": "assistant", "content": "Well, "}]
    reply = client.messages.create(model="fake", max_tokens=9, messages=begun)
    assert prompt_of(engine, reply.id) == "<user>Hi\n<assistant>Well, "


@pytest.mark.parametrize(
    ("choice", "kind"), [({"type": "any"}, "grammar"), ({"type": "tool", "name": "weather"}, None)]
)
def test_a_forced_call_is_constrained(
    client: anthropic.Anthropic, engine: FakeEngine, choice: Any, kind: str | None
) -> None:
    client.messages.create(
        model="fake", max_tokens=9, messages=HI, tools=[WEATHER], tool_choice=choice
    )
    assert engine.params is not None and engine.params.structured is not None
    assert engine.params.structured.kind == "grammar"


def test_output_format(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    client.messages.create(
        model="fake",
        max_tokens=9,
        messages=HI,
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    assert engine.params is not None and engine.params.structured is not None
    assert engine.params.structured.json_schema == '{"type": "object"}'


def test_thinking_is_the_templates_switch(
    thinker: tuple[anthropic.Anthropic, Thinker], client: anthropic.Anthropic
) -> None:
    thinking, engine = thinker
    for kind, said in (("enabled", "True"), ("disabled", "False"), ("adaptive", None)):
        asked: Any = {"type": kind} | ({"budget_tokens": 1024} if kind == "enabled" else {})
        reply = thinking.messages.create(model="fake", max_tokens=2000, messages=HI, thinking=asked)
        text = prompt_of(engine, reply.id)
        assert f"[enable_thinking={said}]" in text if said else "enable_thinking" not in text
    client.messages.create(model="fake", max_tokens=9, messages=HI, thinking={"type": "disabled"})
    with pytest.raises(anthropic.BadRequestError, match="never thinks"):
        client.messages.create(
            model="fake",
            max_tokens=9,
            messages=HI,
            thinking={"type": "enabled", "budget_tokens": 1024},
        )


def test_tokens_are_counted_as_they_would_be_read(
    thinker: tuple[anthropic.Anthropic, Thinker],
) -> None:
    client, engine = thinker
    counted = client.messages.count_tokens(
        model="fake", messages=HI, system="S", tools=[WEATHER]
    ).input_tokens
    reply = client.messages.create(
        model="fake", max_tokens=1, messages=HI, system="S", tools=[WEATHER]
    )
    assert counted == len(engine.prompts[reply.id])


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content[0].type"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"messages": [{"role": "assistant", "content": [CALL]}]}, "results are missing"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context of 4096"),
    ],
)
def test_what_is_not_done_is_named(
    client: anthropic.Anthropic, extra: dict[str, Any], says: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{"model": "fake", "max_tokens": 9, "messages": HI, **extra})
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert says in body["error"]["message"]


def test_missing_fields_are_named(http: httpx.Client) -> None:
    full = {"model": "fake", "max_tokens": 1, "messages": HI}
    for name in full:
        body = {key: value for key, value in full.items() if key != name}
        error = http.post("/v1/messages", json=body).json()["error"]
        assert error["message"] == f"{name} is required"


def test_failures(client: anthropic.Anthropic) -> None:
    def ask(text: str, stream: bool) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        return client.messages.create(model="fake", max_tokens=9, messages=messages, stream=stream)

    with pytest.raises(anthropic.InternalServerError, match="NaN in 1 row"):
        ask("fail-first", True)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=9, messages=HI)
    events = ask("fail-later", True)
    with pytest.raises(anthropic.APIStatusError, match="NaN in 1 row"):
        list(events)
