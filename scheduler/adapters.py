"""The way of each adapter: asked for, staged in the arena, resident in the pool, evicted.

    absent  --asked for-->  loading  --staged-->  staged  --place-->  resident  --evicted--> absent
                               |                    |
                               +----- failed, too large, or wanted by nobody without room -> absent

An adapter is pinned by the sequences that run with it, by those whose last rows are still in
flight, and by its own copy. One that is not pinned can be evicted for a waiting sequence that came
before all those that wait for it, so the oldest always gets its room in the end. Where enough is
free, but not in a row, others are moved together: those that are not pinned, and where that does
not help, those that run as well.

Copies arrive one after the other. Sequences may start with an adapter whose copy is the next to
arrive, since a step waits for it layer by layer; but not behind MAX_BYTES_AHEAD of others, which
the step would hold up all its rows for.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pipeline.messages import (
    AdapterCopy,
    AdapterKey,
    AdapterMove,
    AdapterStaged,
    Failure,
    LoadAdapter,
    PlaceAdapter,
    ReleaseAdapter,
)
from scheduler import failures
from scheduler.adapter_pool import AdapterPool, Extent, Move, Place
from scheduler.policy import MAX_OVERTAKING_SECONDS, ReadyQueue, by_order, discard
from scheduler.sequence import Sequence

MAX_BYTES_AHEAD = 32 << 20  # about 0.6 ms from host memory
MAX_MOVES = 32  # for one adapter, unless it has no room otherwise: each is a few launches

Failed = list[tuple[Sequence, Failure]]


class Adapter:
    """One adapter that is not absent."""

    __slots__ = ("admits", "extent", "key", "last_used", "pins", "staged", "staged_at", "waiting")

    def __init__(self, key: AdapterKey) -> None:
        self.key = key
        self.waiting: list[Sequence] = []  # in order; those that want to start with it
        self.staged: AdapterStaged | None = None  # the latest answer of the loader
        self.staged_at = 0.0
        self.extent: Extent | None = None  # while it is resident, or its copy is on its way
        self.admits = False  # those that wait may start
        self.pins = 0
        self.last_used = 0  # counts up over all adapters

    def wanted_before(self, other: "Adapter") -> bool:
        """Whether somebody waits for it who came before all that wait for the other."""
        if not other.waiting:
            return True
        return bool(self.waiting) and self.waiting[0].order < other.waiting[0].order


class _Placing(NamedTuple):
    """A placement on its way; all of these are pinned by it."""

    adapter: Adapter
    moved: list[Adapter]


class Adapters:
    """All adapters, and the sequences that wait to start, with an adapter or without.

    It keeps `ready` filled with those whose adapter is resident or which have none, and calls
    `send` with what the loader is to be told.
    """

    def __init__(
        self,
        *,
        ready: ReadyQueue,
        send: Callable[[LoadAdapter | ReleaseAdapter], None],
        load_seconds: float,
    ) -> None:
        self._ready = ready
        self._send = send
        self._load_seconds = load_seconds
        self._pool = AdapterPool(nbytes=0, slots=0)  # until the worker is ready
        self._adapter_of: dict[AdapterKey, Adapter] = {}
        self._load_deadline_of: dict[AdapterKey, float] = {}  # soonest first
        self._without_room: list[Adapter] = []  # staged, not resident
        self._arriving: deque[_Placing] = deque()  # in order
        self._room_may_be_found = False
        self._uses = 0

    @property
    def resident(self) -> int:
        return sum(adapter.extent is not None for adapter in self._adapter_of.values())

    @property
    def pool_used_bytes(self) -> int:
        return self._pool.used_bytes

    def worker_ready(self, *, pool_bytes: int, slots: int) -> None:
        self._pool = AdapterPool(nbytes=pool_bytes, slots=slots)

    # --- who waits ---

    def join(self, sequence: Sequence, now: float) -> None:
        """The sequence waits to start, from now on."""
        key = sequence.adapter
        if key is None:
            self._ready.add(sequence)
            return
        adapter = self._adapter_of.get(key)
        if adapter is None:
            adapter = self._load(Adapter(key), sequence.adapter_token, now)
        insort(adapter.waiting, sequence, key=by_order)
        if adapter.admits:
            self._ready.add(sequence)
        elif adapter.staged is None and key not in self._load_deadline_of:
            self._load_deadline_of[key] = now + self._load_seconds  # the answer is overdue already

    def leave(self, sequence: Sequence) -> None:
        """The sequence does not wait any more; nothing happens if it did not."""
        self._ready.discard(sequence)
        adapter = self._adapter_of.get(sequence.adapter) if sequence.adapter else None
        if adapter is None:
            return
        discard(adapter.waiting, sequence)
        if adapter.extent is not None:
            self._room_may_be_found |= adapter.pins == 0
        elif adapter.staged is not None and not adapter.waiting:
            self._give_up(adapter)

    def prefetch(self, key: AdapterKey, token: str | None, now: float) -> None:
        """Somebody will want this adapter soon."""
        adapter = self._adapter_of.get(key)
        if adapter is None:
            self._load(Adapter(key), token, now)
        else:
            self._touch(adapter)

    # --- who runs ---

    def resident_at(self, key: AdapterKey) -> tuple[int, str]:
        """The slot of a resident adapter, and the digest of its content."""
        adapter = self._adapter_of[key]
        assert adapter.extent is not None
        assert adapter.staged is not None
        return adapter.extent.slot, adapter.staged.content

    def pin(self, key: AdapterKey) -> None:
        """Keep a resident adapter where it is until `unpin`."""
        self._adapter_of[key].pins += 1

    def unpin(self, key: AdapterKey) -> None:
        adapter = self._adapter_of[key]
        self._touch(adapter)
        self._let_go(adapter)

    # --- what the loader says, or does not ---

    def staged(self, message: AdapterStaged, now: float) -> None:
        """The adapter lies in the arena; from now on its lease is ours."""
        adapter = self._adapter_of[message.adapter]
        self._load_deadline_of.pop(adapter.key, None)
        adapter.staged = message
        adapter.staged_at = now
        self._without_room.append(adapter)
        self._room_may_be_found = True

    def failed(self, key: AdapterKey) -> list[Sequence]:
        """The adapter cannot be had. Returns those that waited for it."""
        self._load_deadline_of.pop(key, None)
        return self._adapter_of.pop(key).waiting

    def overdue(self, now: float) -> list[Sequence]:
        """Those that wait for a load that should have been answered. A later answer is used."""
        sequences: list[Sequence] = []
        while self._load_deadline_of:
            key, deadline = next(iter(self._load_deadline_of.items()))
            if deadline > now:
                break
            del self._load_deadline_of[key]
            sequences += self._adapter_of[key].waiting
        return sequences

    def next_deadline(self) -> float | None:
        return next(iter(self._load_deadline_of.values()), None)

    # --- who has room in the pool ---

    def barrier(self, now: float) -> Sequence | None:
        """The oldest sequence that has been passed for long enough, see policy.py."""
        adapter = self._passed_too_long(now)
        return None if adapter is None else adapter.waiting[0]

    def place(self, now: float) -> tuple[list[PlaceAdapter], Failed]:
        """Find room in the pool for staged adapters, the one that is waited for longest first.

        Returns what the worker has to do for those that have got it; they are pinned until it is
        `placed`. And the sequences that have to fail, since their adapter is larger than the whole
        pool.
        """
        placements: list[PlaceAdapter] = []
        failed: Failed = []
        while self._room_may_be_found and self._without_room:
            passed = self._passed_too_long(now)
            before = len(self._without_room)
            for adapter in sorted(self._without_room, key=_urgency) if passed is None else [passed]:
                if not self._pool.holds(_nbytes(adapter)):
                    failed += self._refuse(adapter)
                elif (message := self._find_room(adapter, now)) is not None:
                    placements.append(message)
                elif not adapter.waiting:
                    self._give_up(adapter)
            # with the passed one out of the way it is the others' turn
            self._room_may_be_found = passed is not None and len(self._without_room) < before
        self._admit()
        return placements, failed

    def placed(self, slot: int) -> None:
        """The oldest placement is done, so the arena is not read for it any more."""
        adapter, moved = self._arriving.popleft()
        if adapter.extent is None or adapter.extent.slot != slot:
            raise RuntimeError(f"slot {slot} is filled out of order")
        self._release(adapter)
        for one in (adapter, *moved):
            self._let_go(one)
        self._admit()

    def _admit(self) -> None:
        """Let those start whose adapter has arrived, or is about to."""
        ahead = 0
        for adapter, moved in self._arriving:
            if ahead > MAX_BYTES_AHEAD:
                return
            ahead += _nbytes(adapter)
            for one in (adapter, *moved):
                if not one.admits:
                    one.admits = True
                    for sequence in one.waiting:
                        self._ready.add(sequence)

    def _let_go(self, adapter: Adapter) -> None:
        adapter.pins -= 1
        self._room_may_be_found |= adapter.pins == 0

    def _shut(self, adapter: Adapter) -> None:
        """Let nobody start with it."""
        adapter.admits = False
        for sequence in adapter.waiting:
            self._ready.discard(sequence)

    def _find_room(self, adapter: Adapter, now: float) -> PlaceAdapter | None:
        place = self._make_place(adapter)
        if place is None:
            return None
        adapter.extent = place.extent
        self._without_room.remove(adapter)
        self._touch(adapter)
        message = PlaceAdapter(_copy(adapter), tuple(self._move(move) for move in place.moves))
        moved = [self._adapter_of[move.extent.key] for move in place.moves]
        for one in moved:
            if one.pins == 0:
                self._shut(one)  # it is moved behind the copies that are on their way
        for one in (adapter, *moved):
            self.pin(one.key)
        self._arriving.append(_Placing(adapter, moved))
        for extent in place.evicted:
            self._evicted(self._adapter_of[extent.key], now)
        return message

    def _make_place(self, adapter: Adapter) -> Place | None:
        others = [other for other in self._adapter_of.values() if other.extent is not None]
        candidates = [one for one in others if not one.pins and adapter.wanted_before(one)]
        candidates.sort(key=_worth)
        evictable = [one.extent for one in candidates if one.extent is not None]
        pinned = {other.extent for other in others if other.pins and other.extent is not None}
        nbytes = _nbytes(adapter)
        place = self._pool.place(adapter.key, nbytes, evictable, fixed=pinned, most_moves=MAX_MOVES)
        if place is None and adapter.waiting and not self._arriving:
            place = self._pool.place(adapter.key, nbytes, evictable, fixed=())
        return place

    def _move(self, move: Move) -> AdapterMove:
        extent = move.extent
        return AdapterMove(
            slot=extent.slot,
            from_offset=move.from_offset,
            to_offset=extent.offset,
            nbytes=extent.end - extent.offset,
            in_use=self._adapter_of[extent.key].pins > 0,
        )

    def _evicted(self, adapter: Adapter, now: float) -> None:
        adapter.extent = None
        adapter.staged = None
        self._shut(adapter)
        if not adapter.waiting:
            del self._adapter_of[adapter.key]
            return
        self._load(adapter, adapter.waiting[0].adapter_token, now)

    def _refuse(self, adapter: Adapter) -> Failed:
        waiting = list(adapter.waiting)
        failure = failures.adapter_too_large(adapter.key, _nbytes(adapter), self._pool.nbytes)
        self._give_up(adapter)
        return [(sequence, failure) for sequence in waiting]

    def _give_up(self, adapter: Adapter) -> None:
        """Forget a staged adapter."""
        self._release(adapter)
        self._without_room.remove(adapter)
        del self._adapter_of[adapter.key]

    def _load(self, adapter: Adapter, token: str | None, now: float) -> Adapter:
        self._adapter_of[adapter.key] = adapter
        self._load_deadline_of[adapter.key] = now + self._load_seconds
        self._send(LoadAdapter(adapter.key, token))
        return adapter

    def _release(self, adapter: Adapter) -> None:
        assert adapter.staged is not None
        self._send(ReleaseAdapter(adapter.key, adapter.staged.arena_offset))

    def _touch(self, adapter: Adapter) -> None:
        self._uses += 1
        adapter.last_used = self._uses

    def _passed_too_long(self, now: float) -> Adapter | None:
        passed = [
            adapter
            for adapter in self._without_room
            if adapter.waiting and now - adapter.staged_at >= MAX_OVERTAKING_SECONDS
        ]
        return min(passed, key=_urgency, default=None)


def _nbytes(adapter: Adapter) -> int:
    assert adapter.staged is not None
    return adapter.staged.nbytes


def _copy(adapter: Adapter) -> AdapterCopy:
    extent, staged = adapter.extent, adapter.staged
    assert extent is not None
    assert staged is not None
    return AdapterCopy(
        slot=extent.slot,
        pool_offset=extent.offset,
        arena_offset=staged.arena_offset,
        nbytes=staged.nbytes,
        ranks=staged.ranks,
    )


def _urgency(adapter: Adapter) -> tuple[bool, int]:
    """Those that nobody waits for come last."""
    return (not adapter.waiting, adapter.waiting[0].order if adapter.waiting else 0)


def _worth(adapter: Adapter) -> tuple[bool, int]:
    """Of a resident adapter: the first to be evicted has the least."""
    return (bool(adapter.waiting), adapter.last_used)
