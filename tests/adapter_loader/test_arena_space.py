"""The allocator of the arena: extents never overlap, leased ones stay, everything comes back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from adapter_loader.arena_space import Allocation, ArenaSpace
from pipeline.arena import ALIGNMENT as PAGE


def space(pages: int = 8) -> ArenaSpace:
    return ArenaSpace(pages * PAGE)


def take(arena: ArenaSpace, pages: int, leased: bool = False) -> int:
    allocation = arena.allocate(pages * PAGE)
    assert allocation is not None
    if not leased:
        arena.release(allocation.offset)
    return allocation.offset // PAGE


def test_sizes_are_rounded_up_to_pages() -> None:
    arena = space()
    assert arena.allocate(1) == Allocation(0, ())
    assert arena.allocate(PAGE + 1) == Allocation(PAGE, ())
    assert arena.allocate(PAGE) == Allocation(3 * PAGE, ())
    assert arena.used_bytes == 4 * PAGE


def test_what_is_no_whole_page_at_the_end_is_not_used() -> None:
    assert ArenaSpace(3 * PAGE - 1).capacity == 2 * PAGE


def test_the_smallest_hole_that_fits_is_taken() -> None:
    arena = space(9)
    for pages in (3, 1, 2, 1):
        take(arena, pages, leased=True)
    for page in (0, 4):  # holes of 3 at 0, of 2 at 4 and of 2 at 7
        arena.release(page * PAGE)
        arena.free(page * PAGE)
    assert [take(arena, pages, leased=True) for pages in (2, 2, 3)] == [4, 7, 0]


def test_what_is_idle_stays_until_its_room_is_needed_and_the_oldest_goes_first() -> None:
    arena = space(4)
    a, b, _ = take(arena, 2), take(arena, 1), take(arena, 1)
    arena.lease(a * PAGE)
    arena.release(a * PAGE)  # used again
    assert arena.allocate(PAGE) == Allocation(b * PAGE, (b * PAGE,))


def test_neighbours_are_evicted_together_and_nothing_else_is() -> None:
    arena = space(6)
    for pages in (1, 2, 1, 2):
        take(arena, pages)
    # by age: page 0, pages 1-2, page 3; the first two make 3 pages
    assert arena.allocate(3 * PAGE) == Allocation(0, (0, PAGE))
    # the idle page 3 is older than pages 4-5, and not enough
    assert arena.allocate(2 * PAGE) == Allocation(3 * PAGE, (3 * PAGE, 4 * PAGE))


def test_nothing_is_evicted_when_that_would_not_make_room() -> None:
    arena = space(5)
    for pages, leased in ((2, False), (1, True), (2, False)):
        take(arena, pages, leased)
    assert arena.allocate(3 * PAGE) is None
    assert arena.used_bytes == 5 * PAGE
    assert arena.allocate(2 * PAGE) == Allocation(0, (0,))


def test_more_than_the_arena_never_fits() -> None:
    assert space(2).allocate(2 * PAGE + 1) is None


def test_an_extent_is_not_released_more_often_than_leased_nor_freed_while_leased() -> None:
    arena = space()
    take(arena, 1, leased=True)
    with pytest.raises(ValueError, match="is leased"):
        arena.free(0)
    assert arena.release(0)
    with pytest.raises(ValueError, match="not leased"):
        arena.release(0)
    arena.free(0)
    assert arena.used_bytes == 0


class AnyOrder(RuleBasedStateMachine):
    """Any order of calls, beside a list of what is taken."""

    PAGES = 24
    leases = Bundle("leases")  # offsets, one for each lease

    def __init__(self) -> None:
        super().__init__()
        self.arena = space(self.PAGES)
        self.size_of: dict[int, int] = {}
        self.leased: dict[int, int] = {}

    @rule(target=leases, pages=st.integers(1, 10))
    def allocate(self, pages: int) -> int:
        allocation = self.arena.allocate(pages * PAGE)
        if allocation is None:
            assert self.longest_run_without_leased() < pages
            return -1
        for offset in allocation.evicted:
            assert not self.leased.pop(offset), "what is leased was evicted"
            del self.size_of[offset]
        assert allocation.offset % PAGE == 0
        self.size_of[allocation.offset] = pages * PAGE
        self.leased[allocation.offset] = 1
        return allocation.offset

    @rule(target=leases, offset=leases)
    def lease(self, offset: int) -> int:
        if not self.leased.get(offset):
            return -1
        self.arena.lease(offset)
        self.leased[offset] += 1
        return offset

    @rule(offset=consumes(leases))
    def release(self, offset: int) -> None:
        if offset >= 0:
            self.leased[offset] -= 1
            assert self.arena.release(offset) == (self.leased[offset] == 0)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        idle = [offset for offset, leases in self.leased.items() if not leases]
        if idle:
            offset = data.draw(st.sampled_from(idle))
            self.arena.free(offset)
            del self.size_of[offset], self.leased[offset]

    def longest_run_without_leased(self) -> int:
        taken = [False] * self.PAGES
        for offset, leases in self.leased.items():
            if leases:
                pages = range(offset // PAGE, (offset + self.size_of[offset]) // PAGE)
                for page in pages:
                    taken[page] = True
        longest = run = 0
        for page_taken in taken:
            run = 0 if page_taken else run + 1
            longest = max(longest, run)
        return longest

    @invariant()
    def nothing_overlaps_and_all_bytes_are_counted(self) -> None:
        end = 0
        for offset in sorted(self.size_of):
            assert offset >= end
            end = offset + self.size_of[offset]
        assert end <= self.arena.capacity
        assert self.arena.used_bytes == sum(self.size_of.values())

    def teardown(self) -> None:
        for offset, leases in self.leased.items():
            for _ in range(leases):
                self.arena.release(offset)
        allocation = self.arena.allocate(self.arena.capacity)
        assert allocation is not None, "not all came back"
        assert set(allocation.evicted) == set(self.size_of)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_extent_that_somebody_uses_already_is_taken_where_it_lies() -> None:
    arena = space(8)
    arena.take(2 * PAGE, PAGE + 1)
    assert arena.used_bytes == 2 * PAGE
    assert [take(arena, 2, leased=True), take(arena, 4, leased=True)] == [0, 4]
    assert arena.allocate(1) is None
    arena.release(2 * PAGE)
    assert take(arena, 2) == 2


@pytest.mark.parametrize("offset", [0, 1, 3, 7])
def test_an_extent_that_is_not_free_cannot_be_taken(offset: int) -> None:
    arena = space(8)
    take(arena, 1)
    take(arena, 2, leased=True)
    with pytest.raises(ValueError, match="is not free"):
        arena.take(offset * PAGE + (offset == 3), 2 * PAGE)
