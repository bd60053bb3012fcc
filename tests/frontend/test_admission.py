"""Who may come in, and which tokenizer worker serves whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.admission import Admission
from pipeline.errors import RequestError
from pipeline.messages import FailureKind


def refused_by(admission: Admission) -> tuple[int, str]:
    with pytest.raises(RequestError) as refused:
        admission.enter()
    return refused.value.status, refused.value.kind


def test_there_are_so_many_places_and_no_more() -> None:
    admission = Admission(places=2, workers=1)
    admission.enter()
    admission.enter()
    assert refused_by(admission) == (429, FailureKind.OVERLOADED)


def test_a_place_that_is_left_is_free() -> None:
    admission = Admission(places=1, workers=1)
    admission.leave(admission.enter())
    assert admission.in_flight == 0
    admission.enter()


def test_the_worker_with_the_least_in_flight_is_next() -> None:
    admission = Admission(places=9, workers=3)
    assert [admission.enter() for _ in range(4)] == [0, 1, 2, 0]
    admission.leave(1)
    assert [admission.enter() for _ in range(2)] == [1, 1]


def test_nobody_enters_while_it_drains_and_those_inside_may_leave() -> None:
    admission = Admission(places=9, workers=1)
    worker = admission.enter()
    admission.drain()
    assert refused_by(admission) == (503, FailureKind.SHUTDOWN)
    admission.leave(worker)
    assert admission.in_flight == 0


def test_a_place_is_given_back_once() -> None:
    admission = Admission(places=1, workers=1)
    admission.leave(admission.enter())
    with pytest.raises(ValueError, match="nobody"):
        admission.leave(0)


@given(places=st.integers(1, 5), workers=st.integers(1, 4), moves=st.lists(st.booleans()))
def test_places_are_never_exceeded_nor_lost_and_workers_stay_even(
    places: int, workers: int, moves: list[bool]
) -> None:
    admission = Admission(places=places, workers=workers)
    inside: list[int] = []
    for enters in moves:
        if enters and len(inside) < places:
            counts = [inside.count(worker) for worker in range(workers)]
            worker = admission.enter()
            assert counts[worker] == min(counts)
            inside.append(worker)
        elif enters:
            assert refused_by(admission)[0] == 429
        elif inside:
            admission.leave(inside.pop(len(inside) // 2))
        assert admission.in_flight == len(inside) <= places


def test_who_has_died_is_given_nobody_while_another_lives() -> None:
    admission = Admission(places=8, workers=2)
    admission.worker_died(0)
    assert [admission.enter() for _ in range(3)] == [1, 1, 1]
    admission.worker_died(1)
    assert [admission.enter() for _ in range(3)] == [0, 0, 0]
    admission.worker_started(1)
    assert admission.enter() == 1
