"""Spans of loads: one for each that is traced, when it is answered."""

from adapter_loader.traces import LoadTraces
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    Failure,
    FailureKind,
    LoadAdapter,
    Span,
)

KEY = AdapterKey("hub", "org/x")
STAGED = AdapterStaged(KEY, "content", 0, 512, b"")
SOURCE = {"loradex.adapter.source": "hub"}


def test_a_load_has_a_span_until_its_answer_with_the_tier_it_was_found_in() -> None:
    traces = LoadTraces()
    traces.asked(LoadAdapter(KEY, trace="one"), 1.0)
    assert traces.answered(AdapterDropped(KEY), 2.0) == ()
    assert traces.answered(STAGED, 3.0) == (
        Span(
            "one",
            "adapter load",
            1.0,
            3.0,
            {**SOURCE, "loradex.adapter.tier": "disk", "loradex.adapter.bytes": 512},
        ),
    )
    assert traces.answered(STAGED, 4.0) == ()

    traces.asked(LoadAdapter(KEY, trace="two"), 5.0)
    traces.unchanged(KEY)
    (span,) = traces.answered(STAGED, 6.0)
    assert span.attributes["loradex.adapter.tier"] == "host"


def test_a_failed_load_has_its_kind_and_one_that_is_not_traced_nothing() -> None:
    traces = LoadTraces()
    traces.asked(LoadAdapter(KEY), 1.0)
    failed = AdapterFailed(KEY, Failure(404, FailureKind.ADAPTER_NOT_FOUND, "no such"))
    assert traces.answered(failed, 2.0) == ()
    traces.asked(LoadAdapter(KEY, trace="one"), 1.0)
    (span,) = traces.answered(failed, 2.0)
    assert span.failed
    assert span.attributes["error.type"] == "adapter_not_found"
