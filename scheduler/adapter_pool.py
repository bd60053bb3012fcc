"""Which adapter lies where in the device's pool: exact extents and slot numbers."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

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


class AdapterPool:
    """Places adapters. Who may be evicted, and in what order, the caller says."""

    def __init__(self, *, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        self._free_slots = list(range(slots - 1, -1, -1))
        self._extents: list[Extent] = []  # by offset

    @property
    def used_bytes(self) -> int:
        return sum(extent.end - extent.offset for extent in self._extents)

    def holds(self, nbytes: int) -> bool:
        """Whether an adapter of this size fits at all."""
        return _aligned(nbytes) <= self.nbytes

    def place(
        self, key: AdapterKey, nbytes: int, evictable: Iterable[Extent]
    ) -> tuple[Extent, list[Extent]] | None:
        """Give an adapter a slot and the first hole it fits in.

        If there is none, extents go in the order of `evictable` until there is; those whose room
        is not needed after all stay. Returns the new extent and the evicted ones, or None, and
        then nothing is changed.
        """
        size = _aligned(nbytes)
        evictable = list(evictable)
        hole = self._hole(size, evictable)
        if hole is None:
            return None
        victims = [one for one in evictable if one.offset < hole + size and hole < one.end]
        if not victims and not self._free_slots:
            if not evictable:
                return None
            victims = evictable[:1]
        for victim in victims:
            self.evict(victim)
        extent = Extent(key, self._free_slots.pop(), hole, hole + size)
        insort(self._extents, extent, key=_offset)
        return extent, victims

    def evict(self, extent: Extent) -> None:
        self._extents.remove(extent)
        self._free_slots.append(extent.slot)

    def _hole(self, size: int, evictable: list[Extent]) -> int | None:
        """Where `size` bytes are free once as few of `evictable` as possible, from the front,
        are gone."""
        start = 0
        for extent in self._extents:
            if extent.offset - start >= size:
                return start
            start = extent.end
        if self.nbytes - start >= size:
            return start
        kept = list(self._extents)
        for victim in evictable:
            index = bisect_left(kept, victim.offset, key=_offset)
            del kept[index]
            start = kept[index - 1].end if index else 0
            end = kept[index].offset if index < len(kept) else self.nbytes
            if end - start >= size:
                return start
        return None


def _aligned(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
