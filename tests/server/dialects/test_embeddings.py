from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import FakeEngine

PATH = "/v1/embeddings"


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ("abc", [3]),
        (["a", "bcd"], [1, 3]),
        ([1, 2, 3, 4], [4]),
        ([[1], [2, 3]], [1, 2]),
    ],
)
def test_every_form_of_input(
    http: httpx.Client, engine: FakeEngine, given: Any, counts: list[int]
) -> None:
    """The fake's vector is (3 n, 4 n) for n tokens, and so its unit vector (0.6, 0.8)."""
    body = http.post(PATH, json={"input": given, "normalize": False}).json()
    assert body["object"] == "list" and body["model"] == "fake"
    assert [item["index"] for item in body["data"]] == list(range(len(counts)))
    assert [item["embedding"] for item in body["data"]] == [[3.0 * n, 4.0 * n] for n in counts]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == sum(counts)
    assert engine.params is not None and engine.params.pooling == "mean"
    body = http.post(PATH, json={"input": given, "pooling": "last"}).json()
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert engine.params.pooling == "last"


def test_base64_is_little_endian_float32(http: httpx.Client) -> None:
    body = http.post(PATH, json={"input": "x", "encoding_format": "base64"}).json()
    raw = base64.b64decode(body["data"][0]["embedding"])
    assert struct.unpack("<2f", raw) == pytest.approx((0.6, 0.8))


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": {"a": 1}}, "input", "expected a string"),
        ({"input": [1, 999]}, "input", "999"),
        ({"input": "x" * 5000}, "input", "5000"),
        ({"input": ["x"] * 2049}, "input", "2049"),
        ({"dimensions": 2}, "dimensions", "not implemented"),
        ({"encoding_format": "hex"}, "encoding_format", "hex"),
        ({"pooling": "max"}, "pooling", "max"),
        ({"colour": 1}, "colour", "unknown field"),
        ({"model": "other"}, "model", "other"),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client, extra: dict[str, Any], param: str, says: str
) -> None:
    response = http.post(PATH, json={"input": "x"} | extra)
    assert response.status_code == (404 if param == "model" else 400)
    error = response.json()["error"]
    assert error["param"] == param and says in error["message"]


def test_a_failure_is_a_status(http: httpx.Client) -> None:
    assert http.post(PATH, json={"input": "fail-first"}).status_code == 500
