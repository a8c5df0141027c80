from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from astrai.server.http import errors
from astrai.server.http.errors import ApiError
from astrai.server.http.guard import BodyLimits, Guard, check_body, namespace_of
from astrai.server.http.keys import KeyRing

ALICE, BOB = "alice-secret", "bob-secret-1"


def rings(*given: str, file: Path | None = None, env: str | None = None) -> KeyRing:
    environment = {} if env is None else {"ASTRAI_API_KEYS": env}
    return KeyRing.gather(given, file, environment)


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


def test_keys_come_from_flags_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# a comment\n\nteam  file-secret-1\nfile-secret-2\n")
    ring = rings(ALICE, f"bob {BOB}", file=file, env="env-secret-1,carol env-secret-2")
    assert len(ring) == 6
    assert ring.tenant(BOB.encode()) == "bob"
    assert ring.tenant(b"file-secret-1") == "team"
    assert ring.tenant(b"env-secret-2") == "carol"
    unnamed = ring.tenant(ALICE.encode())
    assert unnamed is not None and unnamed.startswith("key-") and ALICE not in unnamed
    for wrong in (b"", b"x", b"alice-secreT", b"bob bob-secret-1", "ключ".encode(), b"\xff\xfe"):
        assert ring.tenant(wrong) is None
    assert ALICE not in repr(ring._keys)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("short", "--api-key 1: a key of 5 characters, expected at least 8"),
        ("", "--api-key 1: 0 words"),
        ("a b c", "--api-key 1: 3 words"),
        ("na/me long-enough-secret", "name 'na/me'"),
    ],
)
def test_a_key_that_cannot_be_meant_is_refused_without_being_shown(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        rings(text)
    assert "secret" not in str(caught.value)


def test_an_empty_key_file_does_not_open_the_door(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# nothing yet\n")
    with pytest.raises(ValueError, match="no key in 1 lines"):
        rings(file=file)
    with pytest.raises(ValueError, match="ASTRAI_API_KEYS 1: 0 words"):
        rings(env="")


# ── the door ────────────────────────────────────────────────────────────────────────────────────


def guarded(keys: KeyRing, **options: Any) -> TestClient:
    app = FastAPI()
    errors.install(app)

    async def who(request: Request) -> dict[str, str]:
        return {"tenant": namespace_of(request), "salted": namespace_of(request, "s")}

    for path in ("/health", "/metrics", "/live", "/live/events", "/v1/models", "/v1/messages"):
        app.add_api_route(path, who, methods=["GET", "POST"])

    @app.websocket("/live/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(namespace_of(websocket))
        await websocket.close()

    return TestClient(Guard(app, keys, **options))


@pytest.fixture(scope="module")
def door() -> Iterator[TestClient]:
    yield guarded(rings(f"alice {ALICE}", f"bob {BOB}"))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {BOB}"},
        {"authorization": f"bearer   {BOB} "},
        {"x-api-key": BOB},
        {"Authorization": "Basic abc", "x-api-key": BOB},
    ],
)
def test_a_key_opens_the_door_and_names_its_tenant(door: TestClient, headers: Any) -> None:
    response = door.get("/v1/models", headers=headers)
    assert response.json() == {"tenant": "bob", "salted": "bob/s"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/live/events", "/nowhere"])
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Bearer"}, "missing_api_key"),
        ({"Authorization": "Bearer wrong-secret"}, "invalid_api_key"),
        ({"x-api-key": "wrong-secret"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {ALICE}x", "x-api-key": ALICE}, "invalid_api_key"),
    ],
)
def test_without_a_known_key_everything_else_is_401(
    door: TestClient, path: str, headers: dict[str, str], code: str
) -> None:
    response = door.post(path, headers=headers, content=b"{}")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["code"] == code and error["type"] == "authentication_error"
    assert "secret" not in response.text


def test_a_refusal_has_the_shape_of_its_family(door: TestClient) -> None:
    body = door.post("/v1/messages", json={}).json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"


def test_health_and_the_empty_page_are_open(door: TestClient) -> None:
    assert door.get("/health").status_code == door.get("/live").status_code == 200


def test_metrics_open_only_by_flag() -> None:
    keys = rings(ALICE)
    assert guarded(keys).get("/metrics").status_code == 401
    assert guarded(keys, open_metrics=True).get("/metrics").status_code == 200


def test_without_keys_the_door_is_open_and_a_salt_still_parts_the_cache() -> None:
    response = guarded(rings()).get("/v1/models", headers={"x-api-key": "anything"})
    assert response.json() == {"tenant": "", "salted": "/s"}


def test_a_websocket_needs_a_key_too(door: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect) as caught, door.websocket_connect("/live/socket"):
        pass
    assert caught.value.code == 1008
    with door.websocket_connect("/live/socket", headers={"x-api-key": ALICE}) as socket:
        assert socket.receive_text() == "alice"


def test_huge_headers_and_urls_are_refused_with_both_numbers(door: TestClient) -> None:
    response = door.get("/health", headers={"x-filler": "x" * 40_000})
    assert response.status_code == 431
    assert "expected at most 32768" in response.json()["error"]["message"]
    response = door.get("/health?" + "x" * 9_000)
    assert response.status_code == 414


# ── what a body may hold ────────────────────────────────────────────────────────────────────────

SMALL = BodyLimits(max_messages=3, max_message_bytes=100, max_tools_bytes=200, max_schema_bytes=150)


def deep(n: int) -> Any:
    value: Any = 1
    for i in range(n):
        value = [value] if i % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"messages": [{"role": "user"}] * 4}, "messages", "4 messages, expected at most 3"),
        ({"input": [{"role": "user"}] * 4}, "input", "4 messages, expected at most 3"),
        ({"messages": [{"content": "x" * 120}]}, "messages[0]", "bytes, expected at most 100"),
        ({"messages": [{}, {"content": "é" * 60}]}, "messages[1]", "bytes, expected at most 100"),
        ({"tools": [{"a": "x" * 300}]}, "tools", "bytes, expected at most 200"),
        ({"response_format": {"a": "x" * 300}}, "response_format", "expected at most 150"),
        ({"guided_regex": "x" * 300}, "guided_regex", "300 bytes, expected at most 150"),
    ],
)
def test_a_part_that_is_too_large_is_refused_with_both_numbers(
    body: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        check_body(json.dumps(body, ensure_ascii=False).encode(), body, SMALL)
    assert caught.value.param == param and caught.value.status == 400


@pytest.mark.parametrize("n", [62, 63, 64, 500])
def test_depth_has_a_bound(n: int) -> None:
    body = {"a": deep(n)}
    raw = json.dumps(body).encode()
    if n < 64:
        check_body(raw, body)
    else:
        with pytest.raises(ApiError, match="deeper than 64 levels"):
            check_body(raw, body)


def test_many_shallow_parts_are_fine() -> None:
    body = {"prompt": [[1, 2]] * 1000, "messages": [{"content": [{"type": "text"}]}] * 100}
    check_body(json.dumps(body).encode(), body)
