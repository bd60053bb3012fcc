"""Traces of requests, for an OpenTelemetry collector. Off unless one is named.

A request has one span here, with what the client sent as `traceparent` as its parent. It is handed
to the other processes in their messages, and they tell of what they did in Spans; so this is the
only process that knows OpenTelemetry. Nothing is told per token, nor any text or secret.
"""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.types import Scope

from frontend.adapter_labels import label_of
from frontend.exchange import header
from pipeline.channels import PROCESSES
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.messages import AdapterKey, End, Span, Spans

if TYPE_CHECKING:  # an extra, which is not installed where nobody traces
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanContext

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TRACES_PATH = "/v1/traces"
FLUSH_MS = 3000  # at the end, for what is still to be sent


def make_tracing(settings: Settings, environment: Mapping[str, str]) -> "Tracing | None":
    """None where no collector is named. Raises ConfigError."""
    if not settings.otlp_endpoint and not any(environment.get(name) for name in ENDPOINTS):
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), None)
    if protocol not in (None, "http/protobuf"):
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol} is not spoken: http/protobuf is"
        )
    try:
        return Tracing(settings)
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: traces need the extra: pip install 'loradex[otel]' ({error})"
        ) from error


class Tracing:
    """The spans of all processes, on their way to the collector in a thread of their own.

    How many requests are traced is for OTEL_TRACES_SAMPLER to say: all, unless the client's
    traceparent says that it is not sampled.
    """

    def __init__(self, settings: Settings) -> None:
        # here, so that who does not trace needs no OpenTelemetry
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider, sampling
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        endpoint = settings.otlp_endpoint.rstrip("/")
        if endpoint and not endpoint.endswith(TRACES_PATH):
            endpoint += TRACES_PATH
        self._spans = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None))

        def provider(process: str, sampler: sampling.Sampler | None) -> TracerProvider:
            attributes = {"loradex.process": process}
            if not os.environ.get("OTEL_SERVICE_NAME"):
                attributes["service.name"] = f"loradex.{process}"
            made = TracerProvider(
                sampler=sampler, resource=Resource.create(attributes), shutdown_on_exit=False
            )
            made.add_span_processor(self._spans)
            return made

        # what others did belongs to a request that is traced already
        of_others = sampling.ParentBased(sampling.ALWAYS_ON)
        tracers: dict[str, TracerProvider] = {
            process: provider(process, None if process == "frontend" else of_others)
            for process in PROCESSES
        }
        self._tracers = {name: one.get_tracer("loradex") for name, one in tracers.items()}
        self._model = settings.model_id
        # time.monotonic(), which all processes share, to time.time(), which the collector knows
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def begin(self, route: str, scope: Scope, arrived: float) -> "RequestSpan":
        """The span of a request that came at this time.monotonic()."""
        carrier = {
            name: value
            for name in ("traceparent", "tracestate")
            if (value := header(scope, name.encode())) is not None
        }
        span = self._tracers["frontend"].start_span(
            f"POST {route}",
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            start_time=self._ns(arrived),
            attributes={
                "http.request.method": "POST",
                "http.route": route,
                "gen_ai.request.model": self._model,
            },
        )
        return RequestSpan(span)

    def record(self, message: Spans) -> None:
        """What another process has done for a request that is traced."""
        for span in message.spans:
            self._record(message.process, span)

    def _record(self, process: str, told: Span) -> None:
        context = self._propagator.extract({"traceparent": told.trace})
        span = self._tracers[process].start_span(
            told.name,
            context=context,
            start_time=self._ns(told.started),
            attributes=told.attributes,
        )
        if told.failed:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(self._ns(told.ended))

    def close(self) -> None:
        """Send what has not been sent; blocks for a while."""
        self._spans.force_flush(FLUSH_MS)
        self._spans.shutdown()  # type: ignore[no-untyped-call]

    def _ns(self, monotonic: float) -> int:
        return self._epoch_ns + int(monotonic * 1e9)


class RequestSpan:
    """The span of one request; to be ended once."""

    def __init__(self, span: "OtelSpan") -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """As W3C writes it; empty when this request is not traced."""
        return traceparent(self._span.get_span_context()) if self._span.is_recording() else ""

    def generated(self, adapter: AdapterKey | None, end: End) -> None:
        """How its reply ended; of a private adapter, a name that tells nobody whose it is."""
        usage = end.usage
        if adapter is not None:
            self._span.set_attribute("loradex.adapter", label_of(adapter))
        self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", [end.reason.value])
        self._span.set_attribute("loradex.cached_tokens", usage.cached_tokens)
        self._span.set_attribute("loradex.first_token_seconds", usage.first_token_seconds)
        if end.failure is not None:
            self._span.set_attribute("error.type", end.failure.kind.value)

    def end(self, status: int) -> None:
        """The reply has been sent, with this status; 499: the client had gone."""
        from opentelemetry.trace import StatusCode  # see Tracing

        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def traceparent(context: "SpanContext") -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
