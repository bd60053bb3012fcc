"""Traces of requests: where they are on, and what a request's span says."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from frontend.tracing import Tracing, make_tracing
from pipeline.errors import ConfigError
from pipeline.messages import Prefetch, Span, Spans
from tests.frontend.fakes import Backend, Connection, fails, failure, says, settings
from tests.otlp_collector import Collector, otlp_collector

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"model": "org/x", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with otlp_collector() as collector:
        yield collector


@pytest.fixture
def tracing(collector: Collector) -> Iterator[Tracing]:
    made = make_tracing(settings(otlp_endpoint=collector.url), {})
    assert made is not None
    yield made
    made.close()


def test_without_a_collector_there_is_no_tracing() -> None:
    assert make_tracing(settings(), {}) is None
    assert make_tracing(settings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is None


def test_a_protocol_that_is_not_spoken_is_refused_at_the_start() -> None:
    environment = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with pytest.raises(ConfigError, match="grpc is not spoken"):
        make_tracing(settings(otlp_endpoint="http://127.0.0.1:4317"), environment)


async def test_without_tracing_no_message_carries_a_trace() -> None:
    backend = Backend(says("Hello"))
    await backend.post(CHAT, BODY, headers={"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"})
    assert [prompt.trace for prompt in backend.prompts()] == [""]


async def test_prompt_and_prefetch_carry_the_span_of_the_request(
    tracing: Tracing, collector: Collector
) -> None:
    backend = Backend(says("Hello", "!"), tracing=tracing)
    trace_id = "1" * 32
    reply = await backend.post(CHAT, BODY, headers={"traceparent": f"00-{trace_id}-{'2' * 16}-01"})
    assert reply.status_code == 200
    tracing.close()
    (span,) = collector.spans
    (prompt,) = backend.prompts()
    (prefetch,) = [message for _, message, _ in backend.sent if isinstance(message, Prefetch)]
    assert prompt.trace == prefetch.trace == f"00-{trace_id}-{span.span_id}-01"
    assert span.name == f"POST {CHAT}"
    assert span.attributes["gen_ai.usage.output_tokens"] == 2
    assert span.attributes["loradex.adapter"] == "hub:org/x"


async def test_a_request_that_fails_and_one_whose_client_goes_have_their_spans(
    tracing: Tracing, collector: Collector
) -> None:
    await Backend(fails(failure()), tracing=tracing).post(CHAT, BODY)
    await Backend(ready=False, tracing=tracing).post(CHAT, BODY)
    waiting = Connection(Backend(tracing=tracing), CHAT, BODY)
    waiting.go()
    await waiting.task
    tracing.close()
    spans = collector.spans
    assert [span.attributes["http.response.status_code"] for span in spans] == [404, 503, 499]
    assert [span.failed for span in spans] == [False, True, False]
    assert spans[0].attributes["error.type"] == "adapter_not_found"


async def test_a_private_adapter_is_not_named(tracing: Tracing, collector: Collector) -> None:
    await Backend(says("Hello"), tracing=tracing).post(CHAT, {**BODY, "api_token": "hf_mine"})
    tracing.close()
    (span,) = collector.spans
    assert span.attributes["loradex.adapter"].startswith("hub:private-")


async def test_what_another_process_did_is_a_child_with_its_own_times(
    tracing: Tracing, collector: Collector
) -> None:
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    tracing.record(Spans("gpu_worker", 0, (Span(parent, "prefill", 10.0, 10.5, {"loradex.x": 3}),)))
    tracing.close()
    (span,) = collector.spans
    assert (span.trace_id, span.parent_id) == ("1" * 32, "2" * 16)
    assert span.end - span.start == pytest.approx(0.5)
    assert (span.process, span.attributes) == ("gpu_worker", {"loradex.x": 3})


def test_where_the_extra_is_not_installed_the_operator_is_told() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from frontend.tracing import make_tracing; from pipeline.config import Settings\n"
        "make_tracing(Settings(otlp_endpoint='http://127.0.0.1:4318'), {})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ConfigError: otlp_endpoint: traces need the extra" in ended.stderr


def test_without_tracing_no_process_imports_opentelemetry() -> None:
    code = (
        "import sys; import frontend.__main__, scheduler.__main__, tokenizer_workers.__main__\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stderr
