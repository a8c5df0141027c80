from __future__ import annotations

from typing import Any

import httpx
import pytest


def test_text_and_back(http: httpx.Client) -> None:
    body = http.post("/tokenize", json={"prompt": "Grüße", "return_token_strs": True}).json()
    assert body["tokens"] == list("Grüße".encode())
    assert body["count"] == 7 and body["max_model_len"] == 4096
    assert body["token_strs"][:2] == ["G", "r"]
    assert http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "Grüße"}
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_is_what_chat_would_read(http: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    tokens = http.post("/tokenize", json=asked).json()["tokens"]
    assert bytes(tokens) == b"<user>Hi\n<assistant>"
    reply = http.post("/v1/chat/completions", json=asked | {"max_tokens": 1}).json()
    assert reply["usage"]["prompt_tokens"] == len(tokens)
    asked["add_generation_prompt"] = False  # type: ignore[assignment]
    assert bytes(http.post("/tokenize", json=asked).json()["tokens"]) == b"<user>Hi\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "promt": 1}, "promt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
