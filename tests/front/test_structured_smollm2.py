"""Structured output of the real model, through the library."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from astrai import LLM, SamplingParams, StructuredOutput

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "born": {"type": "string", "format": "date"},
            "scores": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["name", "born", "scores"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"enum": ["leaf", "<|im_end|>", "naïve 世界"]},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 5},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_slots=8)


def test_texts_match_beside_each_other_and_plain_ones_are_as_without(llm: LLM) -> None:
    asked = [StructuredOutput(json_schema=json.dumps(schema)) for schema in SCHEMAS]
    asked.append(StructuredOutput(regex=r"#[0-9a-f]{6}"))
    prompt = "The following is an example:\n"
    params = [
        SamplingParams(structured=one, temperature=1.0, seed=i, max_tokens=150, logprobs=1)
        for i, one in enumerate([None, *asked, None])
    ]
    params[0] = params[-1] = SamplingParams(temperature=1.0, seed=9, max_tokens=30)
    (alone,) = llm.generate([prompt], params[0], use_tqdm=False)
    outputs = llm.generate([prompt] * len(params), params, use_tqdm=False)
    assert outputs[0].outputs[0].text == outputs[-1].outputs[0].text == alone.outputs[0].text
    for schema, output in zip(SCHEMAS, outputs[1:-2], strict=True):
        (made,) = output.outputs
        assert made.finish_reason in ("stop", "length"), made.error
        if made.finish_reason == "stop":
            jsonschema.validate(json.loads(made.text), schema)
    colour = outputs[-2].outputs[0]
    assert re.fullmatch(r"#[0-9a-f]{6}", colour.text)
    assert colour.logprobs is not None
    assert all(len(step) in (1, 2) for step in colour.logprobs)


def test_a_prefix_hit_and_more_choices_change_nothing(llm: LLM) -> None:
    asked = StructuredOutput(json_schema=json.dumps(SCHEMAS[0]))
    prompt = "A list of people, each a JSON object, and nothing else besides. " * 8
    params = SamplingParams(structured=asked, temperature=0.9, seed=4, max_tokens=80, n=3)
    llm.engine.scheduler.books.drop_cached()
    first, again = (llm.generate([prompt], params, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 64)
    texts = [[choice.text for choice in output.outputs] for output in (first, again)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_bad_schema_is_refused_before_anything_runs(llm: LLM) -> None:
    bad = SamplingParams(structured=StructuredOutput(json_schema='{"not": {}}'))
    before = llm.engine.scheduler.n_tick
    with pytest.raises(ValueError, match=r"prompt 1 of 2: structured: .*Unimplemented keys"):
        llm.generate(["a", "b"], [SamplingParams(), bad], use_tqdm=False)
    assert llm.engine.scheduler.n_tick == before
