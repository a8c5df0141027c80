from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from astrai.observe.tracing import Tracing
from astrai.server.dialects.replies import CompletionReply
from astrai.server.http.access import Access
from astrai.server.http.door import Door
from astrai.server.http.keys import KeyRing
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving, wait_for

HI = {"messages": [{"role": "user", "content": "my secret prompt"}]}
KEY = {"Authorization": "Bearer team-secret"}
CHAT = "/v1/chat/completions"


class Lines(logging.Handler):
    """What was logged of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(getattr(record, "fields", {}))

    def last(self, **want: Any) -> dict[str, Any]:
        """The newest line that has these fields; it comes a moment after the answer."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines if want.items() <= line.items()]

        wait_for(lambda: bool(found()))
        return found()[-1]


@pytest.fixture(scope="module")
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("astrai.request")
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    yield handler
    logger.removeHandler(handler)
    logger.level = level


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def http(spans: InMemorySpanExporter) -> Iterator[httpx.Client]:
    door = Door(
        keys=KeyRing.gather(["team team-secret"], None, {}),
        cors_origins=("https://app.example",),
        tracing=Tracing(SimpleSpanProcessor(spans)),
    )
    with (
        serving(FakeEngine(), door=door) as url,
        httpx.Client(base_url=url, trust_env=False, headers=KEY) as client,
    ):
        yield client


def test_a_request_has_one_line_with_tokens_and_times(http: httpx.Client, lines: Lines) -> None:
    lines.lines.clear()
    id = http.post(CHAT, json=HI).json()["id"]
    line = lines.last(request_id=id)
    assert line["route"] == CHAT and line["status"] == 200 and line["outcome"] == "answered"
    assert line["key"] == "team" and line["finish"] == ["stop"] and line["cached_tokens"] == 2
    assert line["queued_ms"] == 250 and line["waits"] == {"slots": 3}
    assert line["seconds"] < 10
    assert len(lines.lines) == 1
    assert "secret" not in json.dumps(line)


def test_a_failed_stream_is_told_although_its_status_was_200(
    http: httpx.Client, lines: Lines
) -> None:
    body = {"prompt": "fail-later", "stream": True, "max_tokens": 9}
    response = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.status_code == 200 and "NaN" in response.text
    assert lines.last(request_id="mine-1")["outcome"] == "failed"


def test_a_client_that_leaves_is_told(http: httpx.Client, lines: Lines) -> None:
    body = {"prompt": "hang", "stream": True, "max_tokens": 9}
    headers = {"x-request-id": "mine-2"}
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        next(response.iter_lines())
    assert lines.last(request_id="mine-2")["outcome"] == "client left"


def test_a_refusal_is_told_by_its_code_and_never_quotes(http: httpx.Client, lines: Lines) -> None:
    bad = {"messages": [{"role": "user", "content": ["my secret prompt"]}]}
    assert http.post(CHAT, json=bad).status_code == 400
    line = lines.last(status=400)
    assert line["outcome"] == "failed" and line["error_param"].startswith("messages[0]")
    assert "secret" not in json.dumps(line)


def test_a_refusal_at_the_door_is_told_by_its_code_too(http: httpx.Client, lines: Lines) -> None:
    assert http.post(CHAT, json=HI, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert lines.last(status=401)["error_code"] == "invalid_api_key"


def test_a_reply_that_cannot_be_written_failed_and_nobody_left(
    http: httpx.Client, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(CompletionReply, "chunks", fail)
    body = {"prompt": "x", "stream": True, "request_id": "unwritten"}
    assert "ZeroDivisionError" in http.post("/v1/completions", json=body).text
    assert lines.last(request_id="unwritten")["outcome"] == "failed"
    assert http.get("/v1/requests/unwritten").json()["error"] == "ZeroDivisionError"


def test_spans_of_a_request_carry_its_times_and_its_callers_trace(
    http: httpx.Client, spans: InMemorySpanExporter
) -> None:
    spans.clear()
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    http.post(CHAT, json=HI, headers={"traceparent": f"00-{trace}-{parent}-01"})
    wait_for(lambda: len(spans.get_finished_spans()) == 4)
    told = {span.name: span for span in spans.get_finished_spans()}
    assert set(told) == {f"POST {CHAT}", "queued", "prefill", "decode"}
    root = told[f"POST {CHAT}"]
    assert root.parent is not None and f"{root.parent.span_id:016x}" == parent
    attributes = dict(root.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.usage.output_tokens"] > 0
    assert "secret" not in root.to_json()


def test_cors_is_for_the_origins_given_and_a_preflight_needs_no_key(http: httpx.Client) -> None:
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-api-key",
    }
    with httpx.Client(base_url=http.base_url, trust_env=False) as anybody:
        mine = anybody.options(CHAT, headers={"origin": "https://app.example", **ask})
        assert mine.status_code == 200
        assert mine.headers["access-control-allow-origin"] == "https://app.example"
        refused = anybody.post(CHAT, json=HI, headers={"origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = anybody.options(CHAT, headers={"origin": "https://evil.example", **ask})
        assert "access-control-allow-origin" not in other.headers


def test_without_origins_no_other_site_may_read() -> None:
    with serving(FakeEngine()) as url, httpx.Client(base_url=url, trust_env=False) as client:
        response = client.get("/version", headers={"origin": "https://app.example"})
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_the_official_client_parses_answers_with_timings(http: httpx.Client) -> None:
    client = openai.OpenAI(
        base_url=f"{http.base_url}/v1",
        api_key="team-secret",
        http_client=httpx.Client(trust_env=False),
    )
    whole = client.chat.completions.create(model="fake", messages=HI["messages"])  # type: ignore[arg-type]
    assert whole.usage is not None
    timings = whole.model_extra["timings"]  # type: ignore[index]
    assert (
        timings["queued_ms"] == 250 and timings["computed_tokens"] == whole.usage.prompt_tokens - 2
    )
    options = {"include_usage": True}
    for extra in ({}, {"stream_options": options}):
        stream = client.chat.completions.create(
            model="fake",
            messages=HI["messages"],  # type: ignore[arg-type]
            stream=True,
            **extra,  # type: ignore[call-overload]
        )
        found = [c.model_extra["timings"] for c in stream if "timings" in (c.model_extra or {})]
        assert len(found) == 1 and found[0]["decode_ms"] == 125


def test_metrics_count_by_pattern_of_the_route(http: httpx.Client) -> None:
    http.get("/v1/models/fake")
    wait_for(lambda: "/v1/models/{name:path}" in http.get("/metrics").text)
    text = http.get("/metrics").text
    assert "/v1/models/fake" not in text
    assert "astrai_pages_total 8.0" in text


def test_prompts_are_logged_only_when_asked(lines: Lines) -> None:
    with (
        serving(FakeEngine(), door=Door(log_prompts=True)) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        client.post(CHAT, json=HI, headers={"x-request-id": "told"})
    assert "my secret prompt" in lines.last(request_id="told")["body"]


def test_what_breaks_before_an_answer_is_a_500_in_its_familys_shape() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("my secret prompt")

    response = TestClient(Access(broken)).get("/v1/messages")
    assert response.status_code == 500
    assert response.json()["error"] == {
        "type": "api_error",
        "message": "internal error: RuntimeError",
    }


def test_an_account_that_fails_does_not_become_the_requests() -> None:
    class Broken:
        def http(self, *_: Any) -> None:
            raise RuntimeError("no room")

    async def fine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    assert TestClient(Access(fine, metrics=Broken())).get("/").text == "ok"  # type: ignore[arg-type]
