"""The way of each adapter: asked for, staged in the arena, resident in the pool, evicted.

    wanted  --asked for-->  loading  --staged-->  staged  --place-->  resident  --evicted--> wanted
       |                       |                    |                                     or absent
       +-----------------------+----- failed, too large, or waited for by nobody without room ->

The loader is asked in the order of the policy's turns, for so many of each tenant at a time: who
wants thousands at once must not fill the arena, nor stand before all others in the loader's queue.

An adapter is pinned by the sequences that run with it, by those whose last rows are still in
flight, and by its own copy. Room is given in the order of the policy's turns, ahead of a row. One
that is not pinned can be evicted if nobody waits for it; or for somebody whose turn comes first,
once it has been used: turns change with every token, and two must not push each other out for
ever. Where the policy says that room is overdue, all that is not pinned can go. Where enough is
free, but not in a row, others are moved together: those that are not pinned, and where that does
not help, those that run as well. Only the first few in turn are looked at, as often as room may be
found: there may be hundreds.

Copies arrive one after the other. Sequences may start with an adapter whose copy is the next to
arrive, since a step waits for it layer by layer; but not behind MAX_BYTES_AHEAD of others, which
the step would hold up all its rows for. No more than MAX_BYTES_ARRIVING are on their way: who gets
room after that is decided when it is time, and until then others keep theirs.
"""

import heapq
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.messages import (
    AdapterCopy,
    AdapterKey,
    AdapterMove,
    AdapterStaged,
    Failure,
    LoadAdapter,
    PlaceAdapter,
    Prefetch,
    ReleaseAdapter,
)
from scheduler import failures
from scheduler.adapter_pool import AdapterPool, Extent, Move, Place
from scheduler.policy import Policy, by_order, discard
from scheduler.sequence import Sequence

MAX_BYTES_AHEAD = 32 << 20  # about 0.6 ms from host memory
MAX_BYTES_ARRIVING = 512 << 20  # about 10 ms; nobody is evicted for what would be copied later
MAX_LOADS = 32  # of one tenant that are loading, or staged and without room
MAX_TRIES = 8  # adapters that room is looked for in, at a time
MAX_MOVES = 32  # for one adapter, unless it has no room otherwise: each is a few launches

Failed = list[tuple[Sequence, Failure]]


class Adapter:
    """One adapter that is not absent."""

    __slots__ = (
        "admits",
        "asked_by",
        "extent",
        "key",
        "last_used",
        "pins",
        "running",
        "staged",
        "used",
        "waiting",
    )

    def __init__(self, key: AdapterKey) -> None:
        self.key = key
        self.waiting: list[Sequence] = []  # in order; those that want to start with it
        self.asked_by: str | None = None  # the tenant whose load it is, until it has room
        self.staged: AdapterStaged | None = None  # the latest answer of the loader
        self.extent: Extent | None = None  # while it is resident, or its copy is on its way
        self.admits = False  # those that wait may start
        self.pins = 0
        self.running = 0  # those of the pins that are of sequences
        self.used = False  # somebody has started with it since it has its extent
        self.last_used = 0  # counts up over all adapters


class _Placing(NamedTuple):
    """A placement on its way; all of these are pinned by it."""

    adapter: Adapter
    moved: list[Adapter]


class Adapters:
    """All adapters, and the sequences that wait to start, with an adapter or without.

    It tells `policy` who waits and for whom there is room, and calls `send` with what the loader
    is to be told.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        send: Callable[[LoadAdapter | ReleaseAdapter], None],
        load_seconds: float,
    ) -> None:
        self._policy = policy
        self._send = send
        self._load_seconds = load_seconds
        self._pool = AdapterPool(nbytes=0, slots=0)  # until the worker is ready
        self._adapter_of: dict[AdapterKey, Adapter] = {}
        self._resident: dict[AdapterKey, Adapter] = {}  # those of them that have an extent
        self._unpinned: dict[AdapterKey, Adapter] = {}  # those of these that are not pinned
        self._wanted: dict[str, dict[AdapterKey, Adapter]] = {}  # not asked for yet, by tenant
        self._loads: Counter[str] = Counter()  # as MAX_LOADS counts them, by tenant
        self._may_ask: set[str] = set()  # tenants that have fewer loads than before
        self._load_deadline_of: dict[AdapterKey, float] = {}  # soonest first
        self._without_room: list[Adapter] = []  # staged, not resident
        self._arriving: deque[_Placing] = deque()  # in order
        self._room_may_be_found = False
        self._uses = 0
        self.running_bytes = 0  # of those that sequences run with

    @property
    def resident(self) -> int:
        return len(self._resident)

    @property
    def pool_used_bytes(self) -> int:
        return self._pool.used_bytes

    def worker_ready(self, *, pool_bytes: int, slots: int) -> None:
        self._pool = AdapterPool(nbytes=pool_bytes, slots=slots)

    # --- who waits ---

    def join(self, sequence: Sequence, now: float) -> None:
        """The sequence waits to start, from now on."""
        self._policy.join(sequence)
        key = sequence.adapter
        if key is None:
            return
        adapter = self._adapter_of.get(key)
        if adapter is None:
            adapter = self._adapter_of[key] = Adapter(key)
        insort(adapter.waiting, sequence, key=by_order)
        if adapter.asked_by is None and adapter.extent is None:
            self._want(adapter, sequence.tenant, now)
        elif adapter.staged is None and key not in self._load_deadline_of:
            self._load_deadline_of[key] = now + self._load_seconds  # the answer is overdue already

    def leave(self, sequence: Sequence) -> None:
        """The sequence does not wait any more; nothing happens if it did not."""
        self._policy.leave(sequence)
        adapter = self._adapter_of.get(sequence.adapter) if sequence.adapter else None
        if adapter is None:
            return
        discard(adapter.waiting, sequence)
        if adapter.extent is not None:
            self._room_may_be_found |= adapter.pins == 0
        elif adapter.asked_by is None:
            self._want_less(adapter, sequence.tenant)
        elif adapter.staged is not None and not adapter.waiting:
            self._give_up(adapter)

    def prefetch(self, message: Prefetch, now: float) -> None:
        """Somebody will want this adapter soon."""
        adapter = self._adapter_of.get(message.adapter)
        if adapter is not None:
            self._touch(adapter)
        elif self._loads[message.tenant] < MAX_LOADS:
            adapter = self._adapter_of[message.adapter] = Adapter(message.adapter)
            self._load(adapter, message.tenant, message.adapter_token, now)

    # --- who runs ---

    def resident_at(self, key: AdapterKey) -> tuple[int, str]:
        """The slot of a resident adapter, and the digest of its content."""
        adapter = self._adapter_of[key]
        assert adapter.extent is not None
        assert adapter.staged is not None
        return adapter.extent.slot, adapter.staged.content

    def pin(self, key: AdapterKey) -> None:
        """Keep a resident adapter where it is until `unpin`: somebody runs with it."""
        adapter = self._adapter_of[key]
        if not adapter.running:
            self.running_bytes += _nbytes(adapter)
        adapter.running += 1
        self._hold(adapter)
        adapter.used = True

    def unpin(self, key: AdapterKey) -> None:
        adapter = self._adapter_of[key]
        self._touch(adapter)
        adapter.running -= 1
        if not adapter.running:
            self.running_bytes -= _nbytes(adapter)
        self._let_go(adapter)

    # --- what the loader says, or does not ---

    def staged(self, message: AdapterStaged) -> None:
        """The adapter lies in the arena; from now on its lease is ours."""
        adapter = self._adapter_of[message.adapter]
        self._load_deadline_of.pop(adapter.key, None)
        adapter.staged = message
        self._without_room.append(adapter)
        self._policy.block(adapter.key)
        self._room_may_be_found = True

    def failed(self, key: AdapterKey) -> list[Sequence]:
        """The adapter cannot be had. Returns those that waited for it."""
        self._load_deadline_of.pop(key, None)
        adapter = self._adapter_of.pop(key)
        self._load_is_over(adapter)
        return adapter.waiting

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

    def place(self, now: float) -> tuple[list[PlaceAdapter], Failed]:
        """Find room in the pool for staged adapters, in the order of their turns.

        Returns what the worker has to do for those that have got it; they are pinned until it is
        `placed`. And the sequences that have to fail, since their adapter is larger than the whole
        pool.
        """
        placements: list[PlaceAdapter] = []
        failed: Failed = []
        while self._room_may_be_found and self._without_room and self._may_copy():
            overdue = self._policy.overdue(now)
            before = len(self._without_room)
            for adapter in self._in_turn() if overdue is None else [self._adapter_of[overdue]]:
                if not self._may_copy():
                    break
                if not self._pool.holds(_nbytes(adapter)):
                    failed += self._refuse(adapter)
                elif (message := self._find_room(adapter, now, overdue=overdue)) is not None:
                    placements.append(message)
                elif not adapter.waiting:
                    self._give_up(adapter)
            # with these out of the way it is the others' turn
            self._room_may_be_found = len(self._without_room) < before
        self._admit()
        self._ask(now)
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

    def _may_copy(self) -> bool:
        return sum(_nbytes(one.adapter) for one in self._arriving) < MAX_BYTES_ARRIVING

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
                    self._policy.admit(one.key)

    def _hold(self, adapter: Adapter) -> None:
        adapter.pins += 1
        self._unpinned.pop(adapter.key, None)

    def _let_go(self, adapter: Adapter) -> None:
        adapter.pins -= 1
        if adapter.pins == 0:
            self._unpinned[adapter.key] = adapter
            self._room_may_be_found = True

    def _shut(self, adapter: Adapter) -> None:
        """Let nobody start with it."""
        adapter.admits = False
        self._policy.shut(adapter.key)

    def _find_room(
        self, adapter: Adapter, now: float, *, overdue: AdapterKey | None
    ) -> PlaceAdapter | None:
        place = self._make_place(adapter, now, anybody=overdue == adapter.key)
        if place is None:
            return None
        adapter.extent = place.extent
        adapter.used = False
        self._resident[adapter.key] = adapter
        self._needs_no_room(adapter)
        self._touch(adapter)
        message = PlaceAdapter(_copy(adapter), tuple(self._move(move) for move in place.moves))
        moved = [self._adapter_of[move.extent.key] for move in place.moves]
        for one in moved:
            if one.pins == 0:
                self._shut(one)  # it is moved behind the copies that are on their way
        for one in (adapter, *moved):
            self._hold(one)
        self._arriving.append(_Placing(adapter, moved))
        for extent in place.evicted:
            self._evicted(self._adapter_of[extent.key], now)
        return message

    def _make_place(self, adapter: Adapter, now: float, *, anybody: bool) -> Place | None:
        """anybody: evict whoever is not pinned"""
        candidates = [
            one for one in self._unpinned.values() if anybody or self._makes_room(one, adapter, now)
        ]
        candidates.sort(key=_worth)
        evictable = [one.extent for one in candidates if one.extent is not None]
        nbytes = _nbytes(adapter)
        if not self._pool.may_place(nbytes, evictable):
            return None
        pinned = {one.extent for one in self._resident.values() if one.pins and one.extent}
        place = self._pool.place(adapter.key, nbytes, evictable, fixed=pinned, most_moves=MAX_MOVES)
        if place is None and adapter.waiting and not self._arriving:
            place = self._pool.place(adapter.key, nbytes, evictable, fixed=())
        return place

    def _makes_room(self, adapter: Adapter, other: Adapter, now: float) -> bool:
        """Whether an adapter that is not pinned may be evicted for the other."""
        if not adapter.waiting:
            return True
        if not adapter.used or not other.waiting:
            return False
        return self._policy.yields(adapter.key, other.key, now)

    def _in_turn(self) -> list[Adapter]:
        """The first of those without room; those that nobody waits for come last."""
        first = self._first_in_turn(MAX_TRIES, self._without_room)
        return first + [adapter for adapter in self._without_room if not adapter.waiting]

    def _first_in_turn(self, most: int, adapters: Iterable[Adapter]) -> list[Adapter]:
        waited_for = [adapter for adapter in adapters if adapter.waiting]
        return heapq.nsmallest(most, waited_for, key=lambda one: self._policy.turn(one.key))

    def _needs_no_room(self, adapter: Adapter) -> None:
        """It has got room, or is given up."""
        self._without_room.remove(adapter)
        self._policy.unblock(adapter.key)
        self._load_is_over(adapter)

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
        del self._resident[adapter.key]
        del self._unpinned[adapter.key]
        self._shut(adapter)
        if not adapter.waiting:
            del self._adapter_of[adapter.key]
            return
        for tenant in {sequence.tenant: None for sequence in adapter.waiting}:
            self._want(adapter, tenant, now)

    def _refuse(self, adapter: Adapter) -> Failed:
        waiting = list(adapter.waiting)
        failure = failures.adapter_too_large(adapter.key, _nbytes(adapter), self._pool.nbytes)
        self._give_up(adapter)
        return [(sequence, failure) for sequence in waiting]

    def _give_up(self, adapter: Adapter) -> None:
        """Forget a staged adapter."""
        self._release(adapter)
        self._needs_no_room(adapter)
        del self._adapter_of[adapter.key]

    # --- who is asked for ---

    def _want(self, adapter: Adapter, tenant: str, now: float) -> None:
        """Ask for it as soon as this tenant may have one more load."""
        if adapter.asked_by is not None:
            return
        if self._loads[tenant] >= MAX_LOADS:
            self._wanted.setdefault(tenant, {})[adapter.key] = adapter
            return
        token = next(one.adapter_token for one in adapter.waiting if one.tenant == tenant)
        self._load(adapter, tenant, token, now)

    def _want_less(self, adapter: Adapter, tenant: str) -> None:
        """One of this tenant does not wait any more for what has not been asked for."""
        if all(sequence.tenant != tenant for sequence in adapter.waiting):
            self._not_wanted(adapter, tenant)
        if not adapter.waiting:
            del self._adapter_of[adapter.key]

    def _not_wanted(self, adapter: Adapter, tenant: str) -> None:
        wanted = self._wanted.get(tenant, {})
        if wanted.pop(adapter.key, None) is not None and not wanted:
            del self._wanted[tenant]

    def _ask(self, now: float) -> None:
        """For the next in turn of the tenants that may have more loads."""
        tenants, self._may_ask = self._may_ask, set()
        for tenant in tenants:
            free = MAX_LOADS - self._loads[tenant]
            for adapter in self._first_in_turn(free, self._wanted.get(tenant, {}).values()):
                self._want(adapter, tenant, now)

    def _load(self, adapter: Adapter, tenant: str, token: str | None, now: float) -> None:
        for other in {tenant, *(sequence.tenant for sequence in adapter.waiting)}:
            self._not_wanted(adapter, other)
        adapter.asked_by = tenant
        self._loads[tenant] += 1
        self._load_deadline_of[adapter.key] = now + self._load_seconds
        self._send(LoadAdapter(adapter.key, token))

    def _load_is_over(self, adapter: Adapter) -> None:
        """It has room, or cannot have any, or cannot be had."""
        assert adapter.asked_by is not None
        tenant, adapter.asked_by = adapter.asked_by, None
        self._loads[tenant] -= 1
        if not self._loads[tenant]:
            del self._loads[tenant]
        self._may_ask.add(tenant)

    def _release(self, adapter: Adapter) -> None:
        assert adapter.staged is not None
        self._send(ReleaseAdapter(adapter.key, adapter.staged.arena_offset))

    def _touch(self, adapter: Adapter) -> None:
        self._uses += 1
        adapter.last_used = self._uses


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


def _worth(adapter: Adapter) -> tuple[bool, int]:
    """Of a resident adapter: the first to be evicted has the least."""
    return (bool(adapter.waiting), adapter.last_used)
