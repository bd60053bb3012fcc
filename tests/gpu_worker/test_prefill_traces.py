"""Spans of prefills: from the first chunk's launch until the last one's tokens are there."""

from array import array

from gpu_worker.prefill_traces import PrefillTraces
from pipeline.messages import NewRow, Sampling, Step


def new_row(row: int, tokens: int, trace: str = "", cached: int = 0) -> NewRow:
    return NewRow(row, -1, bytes(4 * tokens), tokens, cached, b"", Sampling(), None, trace=trace)


def step(step_id: int, *chunks: int, new: tuple[NewRow, ...] = (), free: int | None = None) -> Step:
    freed = array("i", [] if free is None else [free]).tobytes()
    prefill = array("i", chunks).tobytes()
    return Step(step_id, prefill=prefill, new_rows=new, free_rows=freed)


def test_a_prefill_in_chunks_is_one_span() -> None:
    traces = PrefillTraces()
    traces.launched(step(1, 3, 2, 4, new=(new_row(3, 10, "one", cached=2), new_row(4, 5))), 1.0)
    traces.launched(step(2, 3, 6, 4), 2.0)
    assert traces.done(1, 3.0) == ()
    (span,) = traces.done(2, 4.0)
    assert (span.trace, span.name, span.started, span.ended) == ("one", "prefill", 1.0, 4.0)
    assert span.attributes == {"loradex.prefilled_tokens": 8}
    assert traces.done(3, 5.0) == ()


def test_a_row_that_is_freed_or_given_to_another_has_no_span() -> None:
    traces = PrefillTraces()
    traces.launched(step(1, 0, 0, 4, 1, 0, 4, new=(new_row(0, 9, "a"), new_row(1, 9, "b"))), 1.0)
    traces.launched(step(2, 0, 4, 5, free=0), 2.0)
    traces.launched(step(3, 1, 0, 9, new=(new_row(1, 9),)), 3.0)
    assert [traces.done(number, 4.0) for number in (1, 2, 3)] == [(), (), ()]


def test_a_row_that_comes_back_after_a_preemption_is_prefilled_again() -> None:
    traces = PrefillTraces()
    traces.launched(step(1, 0, 0, 4, new=(new_row(0, 4, "a"),)), 1.0)
    assert len(traces.done(1, 2.0)) == 1
    traces.launched(step(2, 0, 0, 6, new=(new_row(0, 6, "a"),), free=0), 3.0)
    (span,) = traces.done(2, 4.0)
    assert span.attributes == {"loradex.prefilled_tokens": 6}
