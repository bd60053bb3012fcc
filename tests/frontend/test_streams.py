"""The reply of a request: pieces in order, then exactly one end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.streams import Streams
from pipeline.messages import End, FinishReason, Piece, Pieces
from tests.frontend.fakes import end, failure, piece


class Woken:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def nobody() -> None:
    """Nobody waits."""


def test_pieces_are_taken_in_order_and_once() -> None:
    streams = Streams()
    stream = streams.open(1, wake=nobody, streamed=True)
    streams.deliver(Pieces([piece("a"), piece("b")]))
    assert stream.take() == ([piece("a"), piece("b")], None)
    assert stream.take() == ([], None)


def test_an_end_comes_with_the_last_pieces() -> None:
    streams = Streams()
    stream = streams.open(1, wake=nobody, streamed=True)
    streams.deliver(Pieces([piece("a")], (end(1),)))
    assert stream.take() == ([piece("a")], end(1))
    assert stream.ended


def test_nothing_follows_an_end() -> None:
    streams = Streams()
    stream = streams.open(1, wake=nobody, streamed=True)
    streams.deliver(Pieces([], (end(1, FinishReason.STOP),)))
    streams.deliver(Pieces([piece("late")], (end(1, FinishReason.LENGTH),)))
    assert stream.take() == ([], end(1, FinishReason.STOP))
    assert stream.take() == ([], None)


def test_a_message_wakes_those_that_it_is_for() -> None:
    streams = Streams()
    woken = {request_id: Woken() for request_id in (1, 2, 3)}
    for request_id, wake in woken.items():
        streams.open(request_id, wake=wake, streamed=True)
    streams.deliver(Pieces([piece("a", 1)], (end(3),)))
    assert [woken[request_id].times for request_id in (1, 2, 3)] == [1, 0, 1]


def test_a_reply_that_is_not_streamed_is_woken_and_given_out_at_its_end() -> None:
    streams, wake = Streams(), Woken()
    stream = streams.open(1, wake=wake, streamed=False)
    streams.deliver(Pieces([piece("a")]))
    assert wake.times == 0
    assert stream.take() == ([], None)
    streams.deliver(Pieces([piece("b")], (end(1),)))
    assert wake.times == 1
    assert stream.take() == ([piece("a"), piece("b")], end(1))


def test_what_comes_for_a_closed_request_is_ignored() -> None:
    streams, wake = Streams(), Woken()
    streams.open(1, wake=wake, streamed=True)
    streams.close(1)
    streams.deliver(Pieces([piece("late")], (end(1),)))
    assert wake.times == 0
    assert len(streams) == 0


def test_a_request_is_opened_once() -> None:
    streams = Streams()
    streams.open(1, wake=nobody, streamed=True)
    with pytest.raises(ValueError, match="open already"):
        streams.open(1, wake=nobody, streamed=True)


def test_failing_ends_those_that_run_and_names_them() -> None:
    streams = Streams()
    ended = streams.open(1, wake=nobody, streamed=True)
    running = streams.open(2, wake=nobody, streamed=False)
    streams.deliver(Pieces([], (end(1),)))
    assert streams.fail(failure()) == [2]
    assert ended.take() == ([], end(1))
    _, last = running.take()
    assert last is not None
    assert last.failure == failure()


REQUESTS = st.integers(0, 3)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), REQUESTS),
        st.tuples(st.just("close"), REQUESTS),
        st.tuples(st.just("piece"), REQUESTS),
        st.tuples(st.just("end"), REQUESTS),
        st.tuples(st.just("take"), REQUESTS),
        st.tuples(st.just("fail"), st.just(0)),
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens_a_reply_is_its_pieces_in_order_and_then_one_end(
    happenings: list[tuple[str, int]],
) -> None:
    streams = Streams()
    opened = {}
    given: dict[int, list[str]] = {}  # by number of the opening
    sent: dict[int, list[str]] = {}
    number_of: dict[int, int] = {}
    for count, (what, request_id) in enumerate(happenings):
        is_open = request_id in number_of
        if what == "open" and not is_open:
            number_of[request_id] = count
            opened[count] = streams.open(request_id, wake=nobody, streamed=count % 2 == 0)
            given[count], sent[count] = [], []
        elif what == "close" and is_open:
            streams.close(request_id)
            del number_of[request_id]
        elif what == "piece":
            streams.deliver(Pieces([Piece(request_id, str(count))]))
            if is_open and "end" not in sent[number_of[request_id]]:
                sent[number_of[request_id]].append(str(count))
        elif what == "end":
            streams.deliver(Pieces([], (End(request_id, FinishReason.EOS, end().usage),)))
            if is_open and "end" not in sent[number_of[request_id]]:
                sent[number_of[request_id]].append("end")
        elif what == "fail":
            streams.fail(failure())
            for number in number_of.values():
                if "end" not in sent[number]:
                    sent[number].append("end")
        elif what == "take" and is_open:
            pieces, last = opened[number_of[request_id]].take()
            given[number_of[request_id]] += [one.text for one in pieces] + ["end"] * bool(last)
    for number, stream in opened.items():
        pieces, last = stream.take()
        given[number] += [one.text for one in pieces] + ["end"] * bool(last)
        if stream.ended or number % 2 == 0:
            assert given[number] == sent[number]
        else:
            assert given[number] == []
    assert len(streams) == len(number_of)
