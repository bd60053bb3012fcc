"""One trace through all five processes, as the collector of an operator sees it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server
from tests.otlp_collector import Collected, Collector, otlp_collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET, TEXT = "hf_that-nobody-is-told", "Once-upon-a-time"
SPANS = {
    "POST /v1/completions": "frontend",
    "tokenise": "tokenizer_workers",
    "queue": "scheduler",
    "decode": "scheduler",
    "adapter load": "adapter_loader",
    "prefill": "gpu_worker",
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with otlp_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server],
    collector: Collector,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    folder = tmp_path_factory.mktemp("tracing")
    model = tiny.make_model(folder / "model", model_folder)
    tiny.make_adapter(folder / "root" / "good", model)
    return serve(
        environment={
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        },
        model_folder=model,
        adapter_root=folder / "root",
    )


def ask(server: Server, **headers: str) -> tuple[float, float]:
    """One request for the adapter; when it was begun and answered, in seconds since 1970."""
    body = {
        "model": "good",
        "prompt": TEXT,
        "max_tokens": 5,
        "ignore_eos": True,
        "api_token": SECRET,
        "stream": True,
    }
    before = time.time()
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200
    assert "[DONE]" in reply.text
    return before, time.time()


@pytest.fixture(scope="module")
def trace(server: Server, collector: Collector) -> tuple[dict[str, Collected], float, float]:
    """The spans of one request by name, and when it was begun and answered."""
    before, after = ask(server, traceparent=f"00-{TRACE}-{PARENT}-01")
    spans = collector.wait_for(len(SPANS))
    return {span.name: span for span in spans}, before, after


def test_every_process_tells_of_its_part(
    trace: tuple[dict[str, Collected], float, float],
) -> None:
    spans, *_ = trace
    assert {name: span.process for name, span in spans.items()} == SPANS
    assert {span.service for span in spans.values()} == {f"loradex.{p}" for p in SPANS.values()}


def test_it_is_the_clients_trace_and_the_request_is_everybodys_parent(
    trace: tuple[dict[str, Collected], float, float],
) -> None:
    spans, *_ = trace
    assert {span.trace_id for span in spans.values()} == {TRACE}
    root = spans["POST /v1/completions"]
    assert root.parent_id == PARENT
    others = {span.parent_id for span in spans.values() if span is not root}
    assert others == {root.span_id}


def test_the_times_are_those_of_the_request_and_in_its_order(
    trace: tuple[dict[str, Collected], float, float],
) -> None:
    spans, before, after = trace
    root = spans["POST /v1/completions"]
    for span in spans.values():
        assert before - 0.05 <= root.start - 0.001 <= span.start <= span.end <= after + 0.05
    assert spans["tokenise"].end <= spans["queue"].end <= spans["prefill"].start + 0.001
    assert spans["adapter load"].end <= spans["queue"].end
    assert spans["prefill"].end <= spans["decode"].start + 0.001 <= spans["decode"].end + 0.001


def test_the_spans_say_what_was_done_and_neither_text_nor_secret(
    trace: tuple[dict[str, Collected], float, float], collector: Collector
) -> None:
    spans, *_ = trace
    root = spans["POST /v1/completions"].attributes
    assert root["http.response.status_code"] == 200
    assert root["loradex.adapter"] == "local:good"
    assert root["gen_ai.usage.output_tokens"] == 5
    assert root["gen_ai.response.finish_reasons"] == ["length"]
    assert spans["adapter load"].attributes["loradex.adapter.tier"] == "disk"
    assert (
        spans["prefill"].attributes["loradex.prefilled_tokens"]
        == (root["gen_ai.usage.input_tokens"])
    )
    assert spans["decode"].attributes["loradex.produced_tokens"] == 5
    sent = b"".join(collector.bodies)
    assert SECRET.encode() not in sent
    assert TEXT.encode() not in sent


def test_who_is_not_sampled_is_not_traced_and_who_sends_nothing_starts_a_trace(
    server: Server, collector: Collector, trace: tuple[dict[str, Collected], float, float]
) -> None:
    known = len(collector.spans)
    ask(server, traceparent=f"00-{'1' * 32}-{PARENT}-00")
    ask(server)
    # what was loaded already is not loaded again
    spans = collector.wait_for(known + len(SPANS) - 1)[known:]
    assert len({span.trace_id for span in spans}) == 1
    assert not {span.trace_id for span in spans} & {TRACE, "1" * 32}
    (root,) = [span for span in spans if not span.parent_id]
    assert root.name == "POST /v1/completions"


def test_a_load_that_fails_is_an_error_of_its_trace(server: Server, collector: Collector) -> None:
    known = len(collector.spans)
    reply = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "no-such", "adapter_source": "local", "prompt": TEXT},
        timeout=60,
    )
    assert reply.status_code == 404
    failed = {span.name: span for span in collector.wait_for(known + 3)[known:]}
    assert failed["adapter load"].failed
    assert failed["adapter load"].attributes["error.type"] == "adapter_not_found"
    assert failed["POST /v1/completions"].attributes["http.response.status_code"] == 404
