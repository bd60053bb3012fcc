"""Which adapter lies where in the device's pool: exact extents and slot numbers."""

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import NamedTuple

from pipeline.messages import AdapterKey

ALIGNMENT = 256  # bytes; extents start on such borders
_offset = attrgetter("offset")


class Extent:
    """The place of one resident adapter. Offsets and sizes are bytes."""

    __slots__ = ("end", "key", "offset", "slot")

    def __init__(self, key: AdapterKey, slot: int, offset: int, end: int) -> None:
        self.key = key
        self.slot = slot  # its number in the worker's table
        self.offset = offset
        self.end = end  # where the next extent may start


class Move(NamedTuple):
    """An extent goes down to where it lies now; the two ranges may overlap."""

    extent: Extent
    from_offset: int


class Place(NamedTuple):
    """What an adapter has got, and what has made room for it. Moves are to be done in order."""

    extent: Extent
    evicted: list[Extent]
    moves: list[Move]


class _Window(NamedTuple):
    """A hole behind these neighbours, once they have been moved down to `start`."""

    start: int
    extents: list[Extent]
    moved_bytes: int


class AdapterPool:
    """Places adapters. Who may be evicted, and in what order, the caller says."""

    def __init__(self, *, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        self.slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._extents: list[Extent] = []  # by offset
        self.used_bytes = 0

    def largest(self, *, beside: int) -> int:
        """The size of the largest adapter that fits beside so many bytes that are taken."""
        return (self.nbytes - beside) // ALIGNMENT * ALIGNMENT

    def may_place(self, nbytes: int, evictable: Sequence[Extent]) -> bool:
        """Whether there are enough bytes and a slot at all once these are gone; `place` may still
        find no hole."""
        return self._fewest_evictions(_aligned(nbytes), evictable) is not None

    def place(
        self,
        key: AdapterKey,
        nbytes: int,
        evictable: Sequence[Extent],
        *,
        fixed: Collection[Extent] | None = None,
        most_moves: int | None = None,
    ) -> Place | None:
        """Give an adapter a slot and a hole it fits in.

        If there is none, as few extents as possible go in the order of `evictable`, and of the
        others those that are not fixed are moved together, as few bytes as possible. Evictable
        ones whose room is not needed after all stay. Returns None if all that does not help, and
        then nothing is changed.

        fixed       extents that must not be moved; None: all
        most_moves  how many may be moved
        """
        size = _aligned(nbytes)
        fewest = self._fewest_evictions(size, evictable)
        if fewest is None:
            return None
        counts = range(fewest, len(evictable) + 1)

        def find(count: int) -> _Window | None:
            return self._window(size, evictable[:count], fixed, most_moves)

        window = find(fewest)
        if window is not None:
            return self._take(key, size, window, evictable[:fewest])
        at = bisect_left(counts, True, lo=1, key=lambda count: find(count) is not None)
        window = find(counts[at]) if at < len(counts) else None
        return None if window is None else self._take(key, size, window, evictable[: counts[at]])

    def replace(self, key: AdapterKey, nbytes: int, evicted: Extent) -> Place | None:
        """As `place` where this one alone has to go and leaves a hole that is large enough.

        That is nearly always so where adapters are of one size, and needs no look at the others.
        Returns None if it has not to go, or is too small; then nothing is changed.
        """
        size = _aligned(nbytes)
        too_small = evicted.end - evicted.offset < size
        if too_small or self._fewest_evictions(size, [evicted]) != 1:
            return None
        return self._take(key, size, _Window(evicted.offset, [], 0), [evicted])

    def evict(self, extent: Extent) -> None:
        self._extents.remove(extent)
        self._free_slots.append(extent.slot)
        self.used_bytes -= extent.end - extent.offset

    def _fewest_evictions(self, size: int, evictable: Sequence[Extent]) -> int | None:
        """How many have to go in any case: for a slot, and for bytes wherever they are free.

        None if all of them are too few.
        """
        count = 0 if self._free_slots else 1
        if count > len(evictable):
            return None
        free = self.nbytes - self.used_bytes
        free += sum(one.end - one.offset for one in evictable[:count])
        for one in evictable[count:]:
            if free >= size:
                break
            free += one.end - one.offset
            count += 1
        return count if free >= size else None

    def _window(
        self,
        size: int,
        gone: Sequence[Extent],
        fixed: Collection[Extent] | None,
        most_moves: int | None,
    ) -> _Window | None:
        """The cheapest, and the first of those, once some extents are gone.

        A run of neighbours that may move and the holes around them grows at its end, and loses
        at its start what it does not need:

            fixed | hole | first | hole | ... | last - 1 | hole | last
                  ^ start
        """
        without = set(gone)
        kept = [extent for extent in self._extents if extent not in without]
        best: _Window | None = None
        start = first = free = moved_bytes = end = 0
        for last, extent in enumerate([*kept, None]):
            free += (self.nbytes if extent is None else extent.offset) - end
            while first < last:
                hole = kept[first].offset - start
                too_many = most_moves is not None and last - first > most_moves
                if hole and free - hole < size and not too_many:
                    break
                free -= hole
                moved_bytes -= kept[first].end - kept[first].offset
                start = kept[first].end
                first += 1
            if free >= size and (best is None or moved_bytes < best.moved_bytes):
                best = _Window(start, kept[first:last], moved_bytes)
                if not moved_bytes:
                    return best
            if extent is not None:
                end = extent.end
                moved_bytes += extent.end - extent.offset
                if fixed is None or extent in fixed:
                    start, first, free, moved_bytes = end, last + 1, 0, 0
        return best

    def _take(self, key: AdapterKey, size: int, window: _Window, gone: Sequence[Extent]) -> Place:
        hole = window.start + window.moved_bytes
        victims = [one for one in gone if one.offset < hole + size and window.start < one.end]
        if not victims and not self._free_slots:
            victims = [*gone[:1]]
        for victim in victims:
            self.evict(victim)
        moves = []
        to_offset = window.start
        for extent in window.extents:
            moves.append(Move(extent, extent.offset))
            nbytes = extent.end - extent.offset
            extent.offset, extent.end = to_offset, to_offset + nbytes
            to_offset = extent.end
        extent = Extent(key, self._free_slots.pop(), hole, hole + size)
        insort(self._extents, extent, key=_offset)
        self.used_bytes += size
        return Place(extent, victims, moves)


def _aligned(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
