from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from astrai.observe.tracing import Phases, Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NS = 1_000_000_000


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def record(exporter: InMemorySpanExporter, phases: Phases, **options: object) -> list[ReadableSpan]:
    tracing = Tracing(SimpleSpanProcessor(exporter))
    arguments = {"headers": {}, "attributes": {"http.route": "/v1/x", "none": None}} | options
    failed = bool(arguments.pop("failed", False))
    tracing.record(
        "POST /v1/x", began=100.0, ended=102.0, phases=phases, failed=failed, **arguments
    )  # type: ignore[arg-type]
    return list(exporter.get_finished_spans())


def test_a_request_has_a_span_with_its_phases_in_order(exporter: InMemorySpanExporter) -> None:
    spans = {span.name: span for span in record(exporter, Phases(0.25, 0.5, 1.0))}
    root = spans.pop("POST /v1/x")
    assert root.kind == SpanKind.SERVER and root.parent is None
    assert (root.start_time, root.end_time) == (100 * NS, 102 * NS)
    assert dict(root.attributes or {}) == {"http.route": "/v1/x"}
    assert list(spans) == ["queued", "prefill", "decode"]
    at = 100.25
    for span, seconds in zip(spans.values(), (0.25, 0.5, 1.0)):
        assert span.parent is not None and span.parent.span_id == root.context.span_id
        assert span.start_time == pytest.approx(at * NS)
        at += seconds
        assert span.end_time == pytest.approx(at * NS)


def test_phases_that_were_not_reached_have_no_span(exporter: InMemorySpanExporter) -> None:
    spans = record(exporter, Phases(0.25, None, None), failed=True)
    assert [span.name for span in spans] == ["queued", "POST /v1/x"]
    assert spans[-1].status.status_code == StatusCode.ERROR


def test_phases_stay_inside_the_request_whatever_the_clocks_say(
    exporter: InMemorySpanExporter,
) -> None:
    for span in record(exporter, Phases(5.0, 5.0, 5.0)):
        assert 100 * NS <= (span.start_time or 0) <= (span.end_time or 0) <= 102 * NS


def test_the_callers_traceparent_is_honoured(exporter: InMemorySpanExporter) -> None:
    header = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    root = record(exporter, Phases(None, None, None), headers=header)[-1]
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT


@pytest.mark.parametrize("bad", ["", "00-xyz", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_bad_traceparent_starts_a_trace(exporter: InMemorySpanExporter, bad: str) -> None:
    assert (
        record(exporter, Phases(None, None, None), headers={"traceparent": bad})[-1].parent is None
    )


def test_an_unsampled_caller_is_left_alone(exporter: InMemorySpanExporter) -> None:
    header = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert record(exporter, Phases(0.1, 0.1, 0.1), headers=header) == []


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"pip install 'astrai\[otel\]'"):
        Tracing.to_endpoint("http://localhost:4318")


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ValueError, match="expected http://"):
        Tracing.to_endpoint("localhost:4318")
