"""The fields that ask for structured output, and what comes of them over HTTP."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from astrai.front.structured import StructuredOutput
from astrai.server.chat.structured import StructuredFields, from_schema, structured_of
from astrai.server.http.errors import ApiError
from tests.server.live import serving

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}


def asked(**fields: Any) -> StructuredOutput | None:
    return structured_of(StructuredFields(**fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": False},
                }
            },
            {"json_schema": json.dumps(SCHEMA)},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json_schema": "S"}),
        ({"structured_outputs": {"json": "{}"}}, {"json_schema": "{}"}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "a+", "structural_tag": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": "start: A"}}, {"grammar": "start: A"}),
        ({"guided_json": SCHEMA}, {"json_schema": "S"}),
        ({"guided_json": "{}"}, {"json_schema": "{}"}),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ("a",)}),
        ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
    ],
)
def test_every_way_to_ask(fields: Any, expected: Any) -> None:
    if expected and expected.get("json_schema") == "S":
        expected = {"json_schema": json.dumps(SCHEMA)}
    found = asked(**fields)
    assert found == (None if expected is None else StructuredOutput(**expected))
    assert found is None or found.source in fields


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"response_format": {}}, "response_format.type", "is None, expected 'text'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown field"),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            "response_format.schema",
            "unknown field",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "expected an object with a schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "y": 1}}},
            "response_format.json_schema.y",
            "unknown field",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": 1, "schema": {}}}},
            "response_format.json_schema",
            "name is 1, expected str",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "has nothing, expected exactly one"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "has regex and choice",
        ),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "unknown field"),
        (
            {"structured_outputs": {"regex": "a", "structural_tag": "x"}},
            "structured_outputs.structural_tag",
            "not implemented",
        ),
        ({"guided_json": "{"}, "guided_json", "is not JSON"),
        ({"guided_choice": []}, "guided_choice", "expected a list of strings"),
        ({"guided_regex": "a" * 20_000}, "guided_regex", "20000 bytes, expected at most 16384"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "response_format and guided_regex cannot both be given",
        ),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_by_name(fields: Any, param: str, why: str) -> None:
    with pytest.raises(ApiError, match=re.escape(why)) as caught:
        asked(**fields)
    assert caught.value.param == param


def test_a_schema_too_deep_to_write_is_refused() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(ApiError, match="recursion"):
        from_schema({"schema": deep}, "response_format.json_schema")


# ── over HTTP, with the real model ──────────────────────────────────────────────────────────────

PERSON: Any = [{"role": "user", "content": "Describe a person as JSON."}]


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["good", "bad"]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    from astrai import AsyncEngine, EngineConfig

    engine = AsyncEngine(EngineConfig(model="smollm2", max_slots=4, kv_tokens=4096))
    with serving(engine) as url:
        with openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            http_client=httpx.Client(trust_env=False),
        ) as client:
            yield client
        assert engine.stats()["pages_held"] == 0
    gc.collect()


def test_the_official_client_parses_a_model(client: openai.OpenAI) -> None:
    done = client.chat.completions.parse(
        model="smollm2", messages=PERSON, response_format=Person, max_tokens=200, seed=1
    )
    (choice,) = done.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)


def test_every_choice_of_a_stream_is_complete_json(client: openai.OpenAI) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "p", "schema": Person.model_json_schema(), "strict": True},
    }
    texts, reasons = ["", ""], {}
    stream = client.chat.completions.create(
        model="smollm2", messages=PERSON, response_format=form, n=2, seed=3, stream=True,
        max_tokens=200, temperature=1.0,
    )  # fmt: skip
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert reasons == {0: "stop", 1: "stop"}
    assert all(Person.model_validate_json(text) for text in texts)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"(?s)\{.*\}"),
        ({"structured_outputs": {"regex": r"\d{3}-\d{4}"}}, r"\d{3}-\d{4}"),
        ({"guided_choice": ["positive", "<|im_end|>"]}, r"positive|<\|im_end\|>"),
        ({"guided_grammar": 'root ::= "x" ("y" | "z")+ "."'}, r"x[yz]+\."),
        ({"guided_grammar": 'start: "<tool_call>" c\nc: %json {"type": "boolean"}'},
         "<tool_call>(true|false)"),
    ],
)  # fmt: skip
def test_the_text_matches(client: openai.OpenAI, extra: Any, pattern: str) -> None:
    done = client.completions.create(
        model="smollm2", prompt="The answer is ", max_tokens=60, temperature=0.7, seed=5,
        extra_body=extra,
    )  # fmt: skip
    (choice,) = done.choices
    assert choice.finish_reason in ("stop", "length")
    if choice.finish_reason == "stop":
        assert re.fullmatch(pattern, choice.text)


def test_cut_by_max_tokens_is_length(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="smollm2", prompt="x", max_tokens=3, extra_body={"guided_regex": "[ab]{50}"}
    )
    assert done.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_does_not_compile_is_a_400_that_names_it(
    client: openai.OpenAI, stream: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="smollm2", messages=PERSON, stream=stream, n=2,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )  # fmt: skip
    assert caught.value.param == "response_format"
    assert 'Unimplemented keys: ["not"]' in caught.value.message
