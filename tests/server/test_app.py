from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import astrai
from tests.server.fake_engine import SAYS, FakeEngine, Health
from tests.server.live import serving, wait_for

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    return body["error"]


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# ── fields ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "guided_decoding_backend", "any"),
        (CHAT, "audio", {"voice": "x"}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "reasoning_effort", "high"),
        (COMPLETIONS, "suffix", "end"),
        (COMPLETIONS, "best_of", 4),
        (COMPLETIONS, "guided_whitespace_pattern", " "),
    ],
)
def test_known_but_not_done_is_refused_by_name(
    http: httpx.Client, path: str, field: str, value: Any
) -> None:
    error = refused(
        http.post(
            path,
            json={"prompt": "x"} | {field: value} if path == COMPLETIONS else HI | {field: value},
        )
    )
    assert error["param"] == field
    assert error["message"] == f"{field} is not implemented"


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tools": None, "tool_choice": None, "audio": None, "reasoning_effort": None},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"temperature": None, "stop": None, "stream": None, "logit_bias": None},
    ],
)
def test_what_asks_for_nothing_is_accepted(http: httpx.Client, extra: dict[str, Any]) -> None:
    assert http.post(CHAT, json=HI | extra).status_code == 200


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
    ],
)
def test_unknown_field_is_named(http: httpx.Client, extra: dict[str, Any], param: str) -> None:
    error = refused(http.post(CHAT, json=HI | extra))
    assert error["param"] == param
    assert error["code"] == "unknown_field"
    assert param in error["message"]


def test_a_misspelt_field_is_put_right(http: httpx.Client) -> None:
    error = refused(http.post(CHAT, json=HI | {"temprature": 1}))
    assert "did you mean temperature?" in error["message"]


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"temperature": "hot"}, "temperature", "hot"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"max_tokens": 1.5}, "max_tokens", "1.5"),
        ({"max_tokens": True}, "max_tokens", "True"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"n": 0}, "n", "0"),
        ({"stop": 3}, "stop", "a string or a list of strings"),
        ({"stop": ["a", 3]}, "stop", "a string or a list of strings"),
        ({"stop": [""]}, "stop", "not empty"),
        ({"logit_bias": {"abc": 1}}, "logit_bias.abc", "not a token id"),
        ({"logit_bias": {"9" * 5000: 1}}, None, "not a token id"),
        ({"logprobs": True, "top_logprobs": 99}, None, "99"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "disagree"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
        ({"messages": [{"role": "function"}]}, "messages[0].role", "not implemented"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "'image_url' is not implemented",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "reserved"),
    ],
)
def test_a_bad_value_names_its_field(
    http: httpx.Client, extra: dict[str, Any], param: str | None, says: str
) -> None:
    error = refused(http.post(CHAT, json=HI | extra))
    assert error["param"] == param or param is None
    assert says in error["message"]


LONG = "x" * 30_000


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({LONG: 1}, "unknown field"),
        ({"model": LONG}, "is not served here; served: fake"),
        ({"response_format": {"type": LONG}}, "expected 'text', 'json_object' or 'json_schema'"),
        ({"logit_bias": {LONG: 1}}, "is not a token id"),
    ],
)
def test_a_refusal_does_not_repeat_all_that_it_refuses(
    http: httpx.Client, extra: dict[str, Any], says: str
) -> None:
    response = http.post(CHAT, json=HI | extra)
    assert says in response.json()["error"]["message"] and len(response.content) < 3000


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["x", ""]])
def test_an_empty_prompt_is_refused(http: httpx.Client, prompt: Any) -> None:
    assert refused(http.post(COMPLETIONS, json={"prompt": prompt}))["param"] == "prompt"


@pytest.mark.parametrize("prompt", [5, {"a": 1}, [1, "x"], [True], [[1, "x"]]])
def test_a_prompt_of_the_wrong_type_is_refused(http: httpx.Client, prompt: Any) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": prompt}))
    assert error["param"] == "prompt"
    assert "expected a string" in error["message"]


def test_a_missing_prompt_is_named(http: httpx.Client) -> None:
    assert refused(http.post(COMPLETIONS, json={}))["message"] == "prompt is required"
    assert refused(http.post(CHAT, json={}))["message"] == "messages is required"


def test_sampling_fields_reach_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "n": 2,
        "seed": 5,
        "stop": ["END"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop_token_ids": [3],
        "bad_words": ["bad"],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    extra = {"max_completion_tokens": 9, "logit_bias": {"5": -100}, "priority": -3}
    assert http.post(CHAT, json=HI | fields | extra).status_code == 200
    assert engine.params is not None
    for name, value in fields.items():
        wanted = tuple(value) if isinstance(value, list) else value
        assert getattr(engine.params, name) == wanted, name
    assert engine.params.max_tokens == 9
    assert dict(engine.params.logit_bias or {}) == {5: -100}
    assert engine.priority == -3


def test_default_lengths(http: httpx.Client, engine: FakeEngine) -> None:
    http.post(CHAT, json=HI)
    assert engine.params is not None and engine.params.max_tokens is None
    http.post(COMPLETIONS, json={"prompt": "x"})
    assert engine.params.max_tokens == 16


def test_messages_reach_the_template(http: httpx.Client, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "d"},
    ]
    extra = {"chat_template_kwargs": {"k": "v"}, "add_generation_prompt": False}
    reply = http.post(CHAT, json={"messages": messages} | extra).json()
    text = bytes(engine.prompts[reply["id"]]).decode()
    assert text == "<system>Be brief.\n<user>ab\n<assistant>c\n<user>d\n[k=v]"


# ── bodies, routes, limits ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"[1]", "list"),
        (b'{"prompt": "\xff"}', "0xff"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b"[" * 60_000, "JSON"),
    ],
)
def test_a_broken_body_is_refused(http: httpx.Client, body: bytes, says: str) -> None:
    assert says in refused(http.post(COMPLETIONS, content=body))["message"]


def test_a_body_over_the_limit_is_refused_with_both_numbers(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * (1 << 16)}).encode()
    error = refused(http.post(COMPLETIONS, content=body), 413)
    assert error["code"] == "body_too_large"
    assert str(len(body)) in error["message"] and str(1 << 16) in error["message"]

    def pieces() -> Iterator[bytes]:
        yield from (body[i : i + 4096] for i in range(0, len(body), 4096))

    assert refused(http.post(COMPLETIONS, content=pieces()), 413)["code"] == "body_too_large"
    told = http.post("/v1/messages", content=body)
    assert told.status_code == 413 and told.json()["error"]["type"] == "request_too_large"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(http: httpx.Client) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": "x" * 5000}))
    assert error["code"] == "context_length_exceeded"
    assert "5000" in error["message"] and "4096" in error["message"]
    error = refused(http.post(COMPLETIONS, json={"prompt": ["x", "y" * 4096]}))
    assert error["code"] == "context_length_exceeded"


def test_the_engines_own_refusal_is_a_400(http: httpx.Client, engine: FakeEngine) -> None:
    for stream in (False, True):
        for prompt in ([1, 999], [[1], [1, 2], [1, 999]]):
            error = refused(http.post(COMPLETIONS, json={"prompt": prompt, "stream": stream}))
            assert "prompt[1] = 999" in error["message"]
            assert error["param"] == "prompt"
        wait_for(lambda: not engine.open, seconds=2)


def test_a_full_queue_is_a_429(http: httpx.Client, engine: FakeEngine) -> None:
    engine.max_waiting = 0
    try:
        error = refused(http.post(COMPLETIONS, json={"prompt": "x"}), 429)
    finally:
        del engine.max_waiting
    assert error["code"] == "queue_full"


def test_a_template_that_refuses_is_a_400(http: httpx.Client) -> None:
    body = {"messages": [{"role": "assistant", "content": "x"}]}
    error = refused(http.post(CHAT, json=body))
    assert error["code"] == "chat_template_error"
    assert "starts with the assistant" in error["message"]


def test_models_and_names(http: httpx.Client) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["fake", "alias/of-fake"]
    assert http.get("/v1/models/alias/of-fake").json() == cards[1]
    assert refused(http.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert refused(http.post(CHAT, json=HI | {"model": "other"}), 404)["param"] == "model"
    assert http.post(CHAT, json=HI | {"model": "alias/of-fake"}).json()["model"] == "alias/of-fake"
    assert http.post(CHAT, json=HI).json()["model"] == "fake"


def test_routes_that_are_not_there(http: httpx.Client) -> None:
    assert "/nope" in refused(http.get("/nope"), 404)["message"]
    response = http.get(CHAT)
    assert "GET" in refused(response, 405)["message"]
    assert response.headers["allow"] == "POST"


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": astrai.__version__}


def test_health_follows_the_loop(http: httpx.Client, engine: FakeEngine) -> None:
    assert http.get("/health").json() == {
        "status": "ok",
        "reason": "nothing to do",
        "pages_free": 8,
    }
    was, engine.health = engine.health, Health(False, "no tick for 61.0 s", {"waiting": 3})
    try:
        response = http.get("/health")
    finally:
        engine.health = was
    assert response.status_code == 503
    assert response.json()["reason"] == "no tick for 61.0 s"


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_well_formed(http: httpx.Client) -> None:
    body = HI | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20}
    response = http.post(CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "data: [DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 20
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {response.headers["x-request-id"]}
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert last["delta"] == {} and last["finish_reason"] == "length"
    assert all(choice["finish_reason"] is None for choice in middle)
    text = "".join(choice["delta"]["content"] for choice in middle)
    assert text == SAYS.encode()[:20].decode(errors="replace")


def test_streamed_equals_whole(http: httpx.Client) -> None:
    for path, body in ((CHAT, HI), (COMPLETIONS, {"prompt": ["a", "b"]})):
        body = body | {"n": 2, "max_tokens": 30}
        whole = http.post(path, json=body).json()
        texts: dict[int, str] = {}
        reasons = {}
        for chunk in events(http.post(path, json=body | {"stream": True}).text)[:-1]:
            (choice,) = chunk["choices"]
            index = choice["index"]
            delta = choice.get("text", choice.get("delta", {}).get("content", ""))
            texts[index] = texts.get(index, "") + delta
            reasons[index] = choice["finish_reason"]
        choices = whole["choices"]
        assert [choice["index"] for choice in choices] == sorted(texts)
        for choice in choices:
            text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
            assert texts[choice["index"]] == text
            assert reasons[choice["index"]] == choice["finish_reason"] == "length"


def test_usage_counts_each_prompt_once(http: httpx.Client) -> None:
    body = {"prompt": ["abc", "de"], "n": 3, "max_tokens": 4}
    usage = http.post(COMPLETIONS, json=body).json()["usage"]
    assert usage == {
        "prompt_tokens": 5,
        "completion_tokens": 24,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_logprobs_of_a_chat(http: httpx.Client) -> None:
    body = HI | {"logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    content = http.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[b] for b in SAYS.encode()[:4]]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    streamed: list[Any] = []
    for chunk in events(http.post(CHAT, json=body | {"stream": True}).text)[:-1]:
        logprobs = chunk["choices"][0]["logprobs"]
        streamed += logprobs["content"] if logprobs else []
    assert streamed == content
    del body["top_logprobs"]
    content = http.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[]] * 4


def test_logprobs_of_a_completion(http: httpx.Client) -> None:
    body = {"prompt": "x", "logprobs": 1, "max_tokens": 5, "prompt_logprobs": 0}
    choice = http.post(COMPLETIONS, json=body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc", "bytes:\\xc3"]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3]
    assert logprobs["token_logprobs"] == [-0.5] * 5
    assert logprobs["top_logprobs"][0] == {"G": -0.5}
    assert choice["prompt_logprobs"] == [None]
    body["prompt"] = "xy"
    choice = http.post(COMPLETIONS, json=body).json()["choices"][0]
    assert [p and p["token"] for p in choice["prompt_logprobs"]] == [None, "y"]


# ── what goes wrong on the way ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status(
    http: httpx.Client, engine: FakeEngine, stream: bool
) -> None:
    body = {"prompt": "fail-first", "stream": stream}
    assert refused(http.post(COMPLETIONS, json=body), 500)["message"] == "NaN in 1 row"
    wait_for(lambda: not engine.open, seconds=2)


@pytest.mark.parametrize("word", ["fail-later", "raise-later"])
def test_an_error_on_the_way_is_the_last_event(
    http: httpx.Client, engine: FakeEngine, word: str
) -> None:
    response = http.post(COMPLETIONS, json={"prompt": word, "stream": True})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["G", "r"]
    assert last["error"]["type"] == "server_error"
    wait_for(lambda: not engine.open, seconds=2)
    refused(http.post(COMPLETIONS, json={"prompt": word}), 500)
    wait_for(lambda: not engine.open, seconds=2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hang", "hang-first", ["hang", "hang-first", "hang"]])
def test_a_client_that_leaves_closes_its_streams(
    http: httpx.Client, engine: FakeEngine, prompt: Any, stream: bool
) -> None:
    body = {"prompt": prompt, "stream": stream, "n": 2}
    with pytest.raises(httpx.ReadTimeout):
        http.post(COMPLETIONS, json=body, timeout=0.2)
    wait_for(lambda: not engine.open, seconds=2)
    assert http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


def test_a_client_that_stops_reading_closes_its_stream(
    http: httpx.Client, engine: FakeEngine
) -> None:
    body = {"prompt": "hang", "stream": True}
    with http.stream("POST", COMPLETIONS, json=body) as response:
        texts = response.iter_text()
        assert next(texts).startswith("data: ")
        assert len(engine.open) == 1
    wait_for(lambda: not engine.open, seconds=2)


def test_the_engine_lives_as_long_as_the_app() -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        assert httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"] == "fake"
        assert engine.events == ["start"]
    assert engine.events == ["start", "shutdown"]
