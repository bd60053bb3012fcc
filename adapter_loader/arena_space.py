"""Which extents of the arena are taken: a pure allocator with leases.

An extent is leased by those who read or write it. One that nobody leases stays where it is, as a
cache, until its room is needed; the least recently used go first.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from pipeline.arena import ALIGNMENT


@dataclass(slots=True)
class _Extent:
    end: int  # bytes from the arena's start
    leases: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """A new extent, leased once, and the offsets of those that had to go for it."""

    offset: int
    evicted: tuple[int, ...]


class ArenaSpace:
    """Extents by their offset. Sizes are rounded up to whole pages, so that offsets are pages."""

    def __init__(self, nbytes: int) -> None:
        self.capacity = nbytes // ALIGNMENT * ALIGNMENT
        self.used_bytes = 0
        self._extents: dict[int, _Extent] = {}
        self._offsets: list[int] = []  # sorted
        self._idle: dict[int, None] = {}  # not leased; the least recently used first

    def allocate(self, nbytes: int) -> Allocation | None:
        """Take room for nbytes, leased once; None when what is leased leaves no such room."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        offset = self._smallest_hole(size)
        evicted: list[int] = []
        if offset is None:
            found = self._run_of_idle(size)
            if found is None:
                return None
            offset, evicted = found
        for idle in evicted:
            self.free(idle)
        self._extents[offset] = _Extent(offset + size, leases=1)
        insort(self._offsets, offset)
        self.used_bytes += size
        return Allocation(offset, tuple(evicted))

    def take(self, offset: int, nbytes: int) -> None:
        """Lease an extent that somebody uses already; nothing else may lie there."""
        end = offset + -(-nbytes // ALIGNMENT) * ALIGNMENT
        at = bisect_left(self._offsets, offset)
        before = self._extents[self._offsets[at - 1]].end if at else 0
        after = self._offsets[at] if at < len(self._offsets) else self.capacity
        if offset % ALIGNMENT or not before <= offset < end <= after:
            raise ValueError(f"the extent from {offset} to {end} is not free")
        self._extents[offset] = _Extent(end, leases=1)
        self._offsets.insert(at, offset)
        self.used_bytes += end - offset

    def lease(self, offset: int) -> None:
        self._extents[offset].leases += 1
        self._idle.pop(offset, None)

    def release(self, offset: int) -> bool:
        """Give one lease back; True when it was the last."""
        extent = self._extents[offset]
        if extent.leases < 1:
            raise ValueError(f"the extent at {offset} is not leased")
        extent.leases -= 1
        if extent.leases == 0:
            self._idle[offset] = None
        return extent.leases == 0

    def is_leased(self, offset: int) -> bool:
        return self._extents[offset].leases > 0

    def free(self, offset: int) -> None:
        """Forget an extent that nobody leases."""
        if self._extents[offset].leases:
            raise ValueError(f"the extent at {offset} is leased")
        del self._idle[offset]
        self.used_bytes -= self._extents.pop(offset).end - offset
        del self._offsets[bisect_left(self._offsets, offset)]

    def _smallest_hole(self, size: int) -> int | None:
        """The start of the smallest hole of at least `size` bytes."""
        best: tuple[int, int] | None = None
        end = 0
        for offset in (*self._offsets, self.capacity):
            if offset - end >= size and (best is None or offset - end < best[0]):
                best = (offset - end, end)
            if offset != self.capacity:
                end = self._extents[offset].end
        return None if best is None else best[1]

    def _run_of_idle(self, size: int) -> tuple[int, list[int]] | None:
        """A run of holes and idle extents of at least `size` bytes: its start and those extents.

        Idle extents are given up in thought, the least recently used first, until the last one
        joins its neighbours to a run that is long enough. Only those of that run have to go.
        """
        given: set[int] = set()
        for offset in self._idle:
            given.add(offset)
            start, end, members = self._run_around(offset, given)
            if end - start >= size:
                return start, members
        return None

    def _run_around(self, offset: int, given: set[int]) -> tuple[int, int, list[int]]:
        """The run of holes and `given` extents that holds the extent at `offset`."""
        first = last = bisect_left(self._offsets, offset)
        while first > 0 and self._offsets[first - 1] in given:
            first -= 1
        while last + 1 < len(self._offsets) and self._offsets[last + 1] in given:
            last += 1
        start = self._extents[self._offsets[first - 1]].end if first else 0
        end = self._offsets[last + 1] if last + 1 < len(self._offsets) else self.capacity
        return start, end, self._offsets[first : last + 1]
