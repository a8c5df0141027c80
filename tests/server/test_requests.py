from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from astrai.server.http.door import Door
from astrai.server.http.errors import ApiError
from astrai.server.http.keys import ApiKey, KeyRing
from astrai.server.requests import MAX_CHOICES, MAX_ENDED, OpenRequest, RequestBook
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving, wait_for

COMPLETIONS = "/v1/completions"


def make(id: str, owner: str = "", n: int = 1) -> OpenRequest:
    return OpenRequest(id, COMPLETIONS, "fake", owner, owner, n_prompts=n, n_choices=n)


def test_the_book_is_bounded_and_keeps_the_last() -> None:
    book = RequestBook()
    for i in range(MAX_ENDED + 3):
        request = make(f"r{i}")
        book.open(request)
        book.close(request)
        book.close(request, "twice")
    assert not book._open
    assert book.find(f"r{MAX_ENDED + 2}", "").error is None
    assert book.find("r3", "").state == "ended"
    with pytest.raises(ApiError, match="'r2'"):
        book.find("r2", "")


def test_an_open_id_is_not_given_twice_and_an_ended_one_is() -> None:
    book = RequestBook()
    first, second, third = make("a"), make("a"), make("a")
    book.open(first)
    book.open(second)
    assert first.id == "a" and second.id != "a"
    assert book.find(second.id, "") is second
    book.close(first)
    book.open(third)
    assert third.id == "a" and book.find("a", "") is third
    book.close(second)
    assert book.find("a", "") is third


def test_a_request_is_seen_by_its_owner_only() -> None:
    book = RequestBook()
    book.open(make("a", owner="me"))
    assert book.find("a", "me").id == "a"
    with pytest.raises(ApiError) as caught:
        book.find("a", "you")
    assert caught.value.status == 404


def test_state_and_timings(http: httpx.Client) -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 3}
    response = http.post(COMPLETIONS, json=body)
    id = response.headers["x-request-id"]
    assert response.json()["id"] == id
    told = http.get(f"/v1/requests/{id}").json()
    assert told["seconds"] >= 0 and told.pop("seconds") < 10 and told.pop("created") > 1e9
    choices = told.pop("choices")
    assert told.pop("timings")["queued_ms"] == 250.0
    assert told == {
        "id": id,
        "object": "request",
        "route": COMPLETIONS,
        "model": "fake",
        "state": "ended",
        "prompts": 2,
        "choices_total": 4,
        "error": None,
    }
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["prompt_tokens"] for choice in choices] == [2, 2, 1, 1]
    assert choices[3]["completion_tokens"] == 3 and choices[3]["finish_reason"] == "length"
    assert choices[3]["timings"]["queued"] == 0.25
    assert choices[3]["timings"]["waits"] == {"slots": 3}


def test_many_choices_are_told_in_part(http: httpx.Client) -> None:
    body = {"prompt": "ab", "n": MAX_CHOICES + 5, "max_tokens": 1}
    id = http.post(COMPLETIONS, json=body).json()["id"]
    told = http.get(f"/v1/requests/{id}").json()
    assert len(told["choices"]) == MAX_CHOICES and told["choices_total"] == MAX_CHOICES + 5


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings"])
def test_an_id_of_the_clients_choice(http: httpx.Client, path: str) -> None:
    field = "input" if path == "/v1/embeddings" else "prompt"
    for body, headers, id in (
        ({}, {"x-request-id": "mine:1@host"}, "mine:1@host"),
        ({"request_id": "yours-2"}, {}, "yours-2"),
        ({"request_id": "both"}, {"x-request-id": "both"}, "both"),
    ):
        response = http.post(path, json={field: "x", **body}, headers=headers)
        assert response.headers["x-request-id"] == id
        assert http.get(f"/v1/requests/{id}").json()["route"] == path


@pytest.mark.parametrize("id", ["", "a b", "a/b", "ü", "x" * 129])
def test_an_id_that_cannot_be_one_is_refused(http: httpx.Client, id: str) -> None:
    error = http.post(COMPLETIONS, json={"prompt": "x", "request_id": id}).json()["error"]
    assert error["param"] == "request_id" and str(len(id)) in error["message"]


def test_two_ids_that_differ_are_refused(http: httpx.Client) -> None:
    body, headers = {"prompt": "x", "request_id": "b"}, {"x-request-id": "a"}
    error = http.post(COMPLETIONS, json=body, headers=headers).json()["error"]
    assert error["param"] == "request_id" and "'a'" in error["message"]


def ask(http: httpx.Client, body: dict[str, Any], found: list[httpx.Response]) -> threading.Thread:
    def work() -> None:
        found.append(http.post(COMPLETIONS, json=body, headers={"x-request-id": "busy"}))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("prompt", ["hang-first", "hang", ["hang", "hang-first"]])
@pytest.mark.parametrize("stream", [False, True])
def test_delete_ends_a_request_and_says_so(
    http: httpx.Client, engine: FakeEngine, prompt: Any, stream: bool
) -> None:
    found: list[httpx.Response] = []
    thread = ask(http, {"prompt": prompt, "stream": stream}, found)
    wait_for(lambda: bool(engine.open), seconds=2)
    told = http.get("/v1/requests/busy").json()
    assert told["state"] in ("waiting", "answering")
    if prompt == "hang":
        wait_for(lambda: http.get("/v1/requests/busy").json()["state"] == "answering", seconds=2)
    assert http.delete("/v1/requests/busy").json()["aborted"] is True
    thread.join()
    if found[0].status_code == 200:
        assert stream and '"code":"aborted"' in found[0].text.split("data: ")[-1]
    else:
        assert found[0].status_code == 499
        assert found[0].json()["error"]["code"] == "aborted"
    told = http.get("/v1/requests/busy").json()
    assert told["state"] == "ended" and "DELETE" in told["error"]
    assert http.delete("/v1/requests/busy").json()["aborted"] is False
    wait_for(lambda: not engine.open, seconds=2)


def test_a_second_request_of_an_open_id_gets_another(
    http: httpx.Client, engine: FakeEngine
) -> None:
    found: list[httpx.Response] = []
    thread = ask(http, {"prompt": "hang"}, found)
    wait_for(lambda: "busy" in engine.open, seconds=2)
    response = http.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": "busy"})
    assert response.headers["x-request-id"] not in ("busy", "")
    http.delete("/v1/requests/busy")
    thread.join()


def test_what_failed_is_told(http: httpx.Client) -> None:
    http.post(COMPLETIONS, json={"prompt": "fail-later"}, headers={"x-request-id": "failed"})
    told = http.get("/v1/requests/failed").json()
    assert told["state"] == "ended" and told["error"] == "NaN in 1 row"
    with pytest.raises(httpx.ReadTimeout):
        http.post(
            COMPLETIONS, json={"prompt": "hang"}, headers={"x-request-id": "left"}, timeout=0.2
        )
    wait_for(lambda: http.get("/v1/requests/left").json()["state"] == "ended", seconds=2)
    assert http.get("/v1/requests/left").json()["error"] == "the client left"


def test_no_key_sees_the_requests_of_another() -> None:
    engine = FakeEngine()
    keys = KeyRing([ApiKey.of("anna anna-secret", "1"), ApiKey.of("bert bert-secret", "2")])
    with (
        serving(engine, door=Door(keys)) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
    ):
        anna, bert = ({"authorization": f"Bearer {name}-secret"} for name in ("anna", "bert"))
        body = {"prompt": "x", "cache_salt": "s", "request_id": "mine"}
        assert http.post(COMPLETIONS, json=body, headers=anna).status_code == 200
        assert engine.namespace.startswith("anna") and engine.namespace != "anna"
        for path in ("/v1/requests/mine", "/v1/requests/mine/why"):
            assert http.get(path, headers=bert).status_code == 404
        assert http.get("/v1/requests/mine", headers=anna).json()["state"] == "ended"
        assert http.delete("/v1/requests/mine", headers=bert).status_code == 404
        assert http.delete("/v1/requests/mine").status_code == 401
        taken = http.post(COMPLETIONS, json=body, headers=bert).headers["x-request-id"]
        assert taken != "mine", "the id of another's request, which stays to be found"
        assert http.get("/v1/requests/mine", headers=anna).status_code == 200


def test_an_unknown_request_is_a_404(http: httpx.Client) -> None:
    for method in ("GET", "DELETE"):
        response = http.request(method, "/v1/requests/nobody")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"


def test_the_salt_is_a_namespace(http: httpx.Client, engine: FakeEngine) -> None:
    http.post(COMPLETIONS, json={"prompt": "x", "cache_salt": "pepper"})
    assert "pepper" in engine.namespace
    http.post(COMPLETIONS, json={"prompt": "x"})
    assert engine.namespace == ""
    response = http.post(COMPLETIONS, json={"prompt": "x", "cache_salt": "y" * 257})
    assert response.json()["error"]["param"] == "cache_salt"
