"""Where adapters lie in the device's pool."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.messages import AdapterKey
from scheduler.adapter_pool import AdapterPool, Extent

UNIT = 256


def adapter(name: object) -> AdapterKey:
    return AdapterKey("local", str(name))


def fill(pool: AdapterPool, *sizes: int) -> list[Extent]:
    """Place adapters of these sizes, in units."""
    placed = [pool.place(adapter(n), size * UNIT, ()) for n, size in enumerate(sizes)]
    return [place[0] for place in placed if place is not None]


def names(extents: list[Extent]) -> list[str]:
    return [extent.key.id for extent in extents]


def test_extents_are_aligned_and_lie_one_after_the_other() -> None:
    pool = AdapterPool(nbytes=4 * UNIT, slots=4)
    first = pool.place(adapter(1), 100, ())
    second = pool.place(adapter(2), UNIT + 1, ())
    assert first is not None
    assert second is not None
    assert (first[0].offset, second[0].offset) == (0, UNIT)
    assert pool.used_bytes == 3 * UNIT


def test_each_adapter_has_a_slot_of_its_own_until_it_is_evicted() -> None:
    pool = AdapterPool(nbytes=4 * UNIT, slots=2)
    first, second = fill(pool, 1, 1)
    assert {first.slot, second.slot} == {0, 1}
    assert pool.place(adapter("late"), UNIT, ()) is None
    place = pool.place(adapter("late"), UNIT, [second])
    assert place is not None
    assert place[0].slot == second.slot
    assert names(place[1]) == ["1"]


def test_the_first_hole_that_fits_is_taken() -> None:
    pool = AdapterPool(nbytes=6 * UNIT, slots=8)
    _, small, _, large, _ = fill(pool, 1, 1, 1, 2, 1)
    pool.evict(small)
    pool.evict(large)
    place = pool.place(adapter("new"), 2 * UNIT, ())
    assert place is not None
    assert place[0].offset == large.offset


def test_nobody_is_evicted_while_there_is_a_hole() -> None:
    pool = AdapterPool(nbytes=3 * UNIT, slots=8)
    extents = fill(pool, 1, 1)
    place = pool.place(adapter("new"), UNIT, extents)
    assert place is not None
    assert place[1] == []


def test_those_whose_room_does_not_help_stay() -> None:
    pool = AdapterPool(nbytes=4 * UNIT, slots=8)
    first, pinned, third, fourth = fill(pool, 1, 1, 1, 1)
    place = pool.place(adapter("new"), 2 * UNIT, [first, third, fourth])
    assert place is not None
    assert names(place[1]) == ["2", "3"]
    assert place[0].offset == pinned.end


def test_without_enough_room_nothing_is_changed() -> None:
    pool = AdapterPool(nbytes=3 * UNIT, slots=8)
    first, _, third = fill(pool, 1, 1, 1)
    assert pool.place(adapter("new"), 2 * UNIT, [first, third]) is None
    assert pool.used_bytes == 3 * UNIT


def test_an_adapter_larger_than_the_pool_is_known_as_such() -> None:
    pool = AdapterPool(nbytes=2 * UNIT, slots=8)
    assert pool.largest(beside=0) == 2 * UNIT
    assert pool.largest(beside=UNIT + 1) < UNIT


def test_free_bytes_that_are_apart_are_brought_together() -> None:
    pool = AdapterPool(nbytes=6 * UNIT, slots=8)
    first, second, third, fourth, _ = fill(pool, 1, 1, 1, 1, 2)
    pool.evict(first)
    pool.evict(third)
    assert pool.place(adapter("new"), 2 * UNIT, ()) is None
    place = pool.place(adapter("new"), 2 * UNIT, (), fixed=())
    assert place is not None
    assert place.moves == [(second, UNIT)]
    assert (second.offset, second.end, place.extent.offset) == (0, UNIT, UNIT)
    assert fourth.offset == 3 * UNIT


def test_the_fewest_bytes_are_moved() -> None:
    pool = AdapterPool(nbytes=9 * UNIT, slots=8)
    first, large, third, small, fifth, _ = fill(pool, 1, 3, 1, 1, 1, 2)
    for gone in (first, third, fifth):
        pool.evict(gone)
    place = pool.place(adapter("new"), 2 * UNIT, (), fixed=())
    assert place is not None
    assert place.moves == [(small, 5 * UNIT)]
    assert (large.offset, place.extent.offset) == (UNIT, 5 * UNIT)


def test_those_that_are_fixed_are_not_moved() -> None:
    pool = AdapterPool(nbytes=6 * UNIT, slots=8)
    first, second, third, fourth, fifth, sixth = fill(pool, 1, 1, 1, 1, 1, 1)
    place = pool.place(adapter("new"), 2 * UNIT, [first, third, fifth], fixed=[second, sixth])
    assert place is not None
    assert names(place.evicted) == ["2", "4"]
    assert place.moves == [(fourth, 3 * UNIT)]
    assert place.extent.offset == 3 * UNIT


def test_no_more_are_moved_than_may_be() -> None:
    pool = AdapterPool(nbytes=4 * UNIT, slots=8)
    first, *_, last = fill(pool, 1, 1, 1, 1)
    pool.evict(first)
    pool.evict(last)
    assert pool.place(adapter("new"), 2 * UNIT, (), fixed=(), most_moves=1) is None
    assert pool.place(adapter("new"), 2 * UNIT, (), fixed=(), most_moves=2) is not None


@given(
    units=st.integers(1, 12),
    slots=st.integers(1, 6),
    seed=st.randoms(use_true_random=False),
)
def test_extents_never_overlap_and_only_what_may_be_evicted_is(
    units: int, slots: int, seed: random.Random
) -> None:
    pool = AdapterPool(nbytes=units * UNIT, slots=slots)
    resident: dict[str, Extent] = {}
    for number in range(40):
        evictable = [extent for extent in resident.values() if seed.random() < 0.6]
        seed.shuffle(evictable)
        nbytes = seed.randint(0, units * UNIT)
        place = pool.place(adapter(number), nbytes, evictable)
        if place is None:
            continue
        extent, evicted, moves = place
        assert not moves
        assert set(names(evicted)) <= set(names(evictable))
        for gone in evicted:
            del resident[gone.key.id]
        resident[str(number)] = extent
        ordered = sorted(resident.values(), key=lambda one: one.offset)
        assert all(one.end <= two.offset for one, two in itertools.pairwise(ordered))
        assert ordered[-1].end <= units * UNIT
        assert extent.end - extent.offset >= nbytes
        assert len({one.slot for one in ordered}) == len(ordered) <= slots
    place = pool.place(adapter("all"), units * UNIT, list(resident.values()))
    assert place is not None
    assert pool.used_bytes == units * UNIT


@given(
    sizes=st.lists(st.integers(1, 4), max_size=8),
    slots=st.integers(1, 8),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_a_place_may_be_had_exactly_if_one_is_found_once_all_others_may_move(
    sizes: list[int], slots: int, size: int, data: st.DataObject
) -> None:
    pool = AdapterPool(nbytes=12 * UNIT, slots=slots)
    placed = fill(pool, *sizes)
    evictable = data.draw(st.permutations(placed))[: data.draw(st.integers(0, len(placed)))]
    may_place = pool.may_place(size * UNIT, evictable)
    place = pool.place(adapter("new"), size * UNIT, evictable, fixed=())
    assert may_place == (place is not None)
