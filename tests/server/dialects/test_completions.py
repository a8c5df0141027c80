"""`echo`: prompts in front of their completions, with the scores of their tokens."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import SAYS, FakeEngine

PATH = "/v1/completions"


def streamed(http: httpx.Client, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for line in http.post(PATH, json=body | {"stream": True}).text.split("\n\n")[:-2]:
        (piece,) = json.loads(line.removeprefix("data: "))["choices"]
        choice = choices.setdefault(piece["index"], {"text": "", "logprobs": None})
        choice["text"] += piece["text"]
        if piece["logprobs"] is not None:
            before = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
            choice["logprobs"] = {name: before[name] + piece["logprobs"][name] for name in before}
    return choices


@pytest.mark.parametrize("stream", [False, True])
def test_text_and_scores_of_the_prompt_come_first(http: httpx.Client, stream: bool) -> None:
    body: dict[str, Any] = {"prompt": ["aé", "bc"], "echo": True, "logprobs": 1, "n": 2}
    body["max_tokens"] = 2
    if stream:
        choices = [choice for _, choice in sorted(streamed(http, body).items())]
    else:
        choices = http.post(PATH, json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["aéGr", "aéGr", "bcGr", "bcGr"]
    for choice in choices[:2]:
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "G", "r"]
        assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
        assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][3] == {"G": -0.5}
        assert "prompt_logprobs" not in choice


def test_scoring_alone(http: httpx.Client, engine: FakeEngine) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}
    reply = http.post(PATH, json=body).json()
    (choice,) = reply["choices"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]
    assert reply["usage"]["completion_tokens"] == 0
    assert streamed(http, body)[0]["logprobs"] == choice["logprobs"]
    del body["logprobs"]
    (choice,) = http.post(PATH, json=body).json()["choices"]
    assert choice["text"] == "abc" and choice["logprobs"] is None
    assert engine.params is not None and engine.params.max_tokens == 0


def test_echo_beside_prompt_logprobs(http: httpx.Client) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "prompt_logprobs": 2, "max_tokens": 1}
    (choice,) = http.post(PATH, json=body).json()["choices"]
    assert [len(top or ()) for top in choice["logprobs"]["top_logprobs"]] == [0, 1, 1]
    assert [len(p["top_logprobs"]) for p in choice["prompt_logprobs"] if p] == [2]


def test_token_ids_are_echoed_as_their_text(http: httpx.Client) -> None:
    body = {"prompt": [[97, 0xC3, 0xA9], [98]], "echo": True, "logprobs": 0, "max_tokens": 1}
    choices = http.post(PATH, json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["aéG", "bG"]
    assert choices[0]["logprobs"]["text_offset"] == [0, 1, 1, 2]


def test_echo_alone_is_text(http: httpx.Client) -> None:
    (choice,) = http.post(PATH, json={"prompt": "ab: ", "echo": True}).json()["choices"]
    assert choice["text"] == "ab: " + SAYS.encode()[:16].decode() and choice["logprobs"] is None


def test_nothing_to_do_is_refused(http: httpx.Client) -> None:
    error = http.post(PATH, json={"prompt": "x", "max_tokens": 0}).json()["error"]
    assert error["param"] == "max_tokens"


def test_too_many_prompts_are_refused_with_both_numbers(http: httpx.Client) -> None:
    error = http.post(PATH, json={"prompt": [[1]] * 2049}).json()["error"]
    assert error["param"] == "prompt"
    assert "2049" in error["message"] and "2048" in error["message"]
    error = http.post(PATH, json={"prompt": ["a", "b"], "n": 10_000}).json()["error"]
    assert error["param"] == "n"
    assert "20000" in error["message"] and "16384" in error["message"]
