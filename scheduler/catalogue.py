"""What is known of each adapter that was ever staged, wherever it lies now. Pure.

Those that lie neither in the device's pool nor in the arena are forgotten when there are too many,
the least recently used first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator

from pipeline.adapter_layout import unpack_ranks
from pipeline.messages import AdapterKey, AdapterStaged, Tier

MAX_KNOWN = 4096  # besides those in the arena


class Known:
    """One adapter. Times are seconds of the scheduler's clock."""

    __slots__ = ("in_arena", "last_used", "loads", "nbytes", "rank")

    def __init__(self) -> None:
        self.in_arena = False
        self.last_used = 0.0
        self.loads = 0
        self.nbytes = 0  # packed
        self.rank = 0  # the largest of its modules


class Catalogue:
    """Told of requests and of what the loader says. hits counts requests by where their adapter
    lay when they came."""

    def __init__(self, most: int = MAX_KNOWN) -> None:
        self.hits: Counter[Tier] = Counter()
        self._most = most
        self._known: OrderedDict[AdapterKey, Known] = OrderedDict()  # by last use
        self._in_arena = 0

    def __iter__(self) -> Iterator[AdapterKey]:
        return iter(self._known)

    def of(self, key: AdapterKey) -> Known:
        return self._known[key]

    def tier(self, key: AdapterKey, *, resident: bool) -> Tier:
        known = self._known.get(key)
        if resident:
            return Tier.DEVICE
        return Tier.HOST if known is not None and known.in_arena else Tier.DISK

    def asked(self, key: AdapterKey, now: float, *, resident: bool) -> None:
        """A request for it has come."""
        self.hits[self.tier(key, resident=resident)] += 1
        known = self._known.get(key)
        if known is not None:
            known.last_used = now
            self._known.move_to_end(key)

    def staged(self, message: AdapterStaged, now: float) -> None:
        """It lies in the arena."""
        known = self._known.setdefault(message.adapter, Known())
        self._known.move_to_end(message.adapter)
        self._in_arena += not known.in_arena
        known.in_arena = True
        known.last_used = now
        known.loads += 1
        known.nbytes = message.nbytes
        known.rank = max(unpack_ranks(message.ranks), default=0)
        self._forget_some()

    def arena_is_new(self) -> None:
        """Nothing is to be found in it again."""
        for known in self._known.values():
            known.in_arena = False
        self._in_arena = 0
        self._forget_some()

    def dropped(self, key: AdapterKey) -> None:
        """It has left the arena."""
        known = self._known.get(key)
        if known is not None and known.in_arena:
            known.in_arena = False
            self._in_arena -= 1
            self._forget_some()

    def _forget_some(self) -> None:
        while len(self._known) - self._in_arena > self._most:
            oldest = next(key for key, known in self._known.items() if not known.in_arena)
            del self._known[oldest]
