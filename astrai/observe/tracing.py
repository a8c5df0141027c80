"""OpenTelemetry spans of requests, made when a request is over: it costs nothing while it runs.

    POST /v1/chat/completions        the request, child of the caller's traceparent if there is one
    ├─ queued                        arrival to admission
    ├─ prefill                       admission to the first token
    └─ decode                        first token to end

Needs the extra "otel", which is imported when the first Tracing is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_NS = 1_000_000_000


class Phases(NamedTuple):
    """Seconds that a request spent one after the other; None for what it never reached."""

    queued: float | None
    prefill: float | None
    decode: float | None


class Tracing:
    """Turns ended requests into spans. Owns the tracer provider and its exporter."""

    def __init__(self, processor: SpanProcessor, service: str = "astrai") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("astrai")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_endpoint(cls, endpoint: str) -> Tracing:
        """Send spans in batches, from a thread, to an OTLP collector over HTTP.

        Raises ImportError naming the extra, ValueError if the endpoint is no URL.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"--otlp-endpoint {endpoint!r}, expected http://… or https://…")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ImportError(
                f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'astrai[otel]'"
            ) from None
        path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + path)))

    def record(
        self,
        name: str,
        headers: Mapping[str, str],
        began: float,
        ended: float,
        phases: Phases,
        attributes: Mapping[str, Any],
        failed: bool,
    ) -> None:
        """Spans of a request between two times (Unix seconds).

        The phases end with the request's last token, so what is left of the request before them is
        the edge's: reading, checking, encoding.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        start, end = int(began * _NS), int(ended * _NS)
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(dict(headers)),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes={k: v for k, v in attributes.items() if v is not None},
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        known = [(phase, s) for phase, s in zip(phases._fields, phases) if s is not None]
        at = max(start, end - int(sum(s for _, s in known) * _NS))
        for phase, seconds in known:
            child = self._tracer.start_span(phase, context=inside, start_time=at)
            at = min(end, at + int(seconds * _NS))
            child.end(end_time=at)
        span.end(end_time=end)

    def shutdown(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
