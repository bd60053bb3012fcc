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

The loader is asked again about an adapter that is there, with the token of whoever wants it now:
it says whether its source still lets it be read, and whether the content is still the same.
Requests that come within `revalidate_seconds` of the last question that was answered well start at
once; in the second half of that time they have the loader asked beside it, so that an adapter in
steady use is waited for by nobody. Later ones wait for the answer. Another content is another
Adapter; the outdated one goes on under a key of its own for the sequences that have started with
it, and goes with the last of them.

Copies arrive one after the other. Sequences may start with an adapter whose copy is the next to
arrive, since a step waits for it layer by layer; but not behind MAX_BYTES_AHEAD of others, which
the step would hold up all its rows for.
"""

import heapq
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.messages import (
    AdapterKey,
    AdapterMove,
    AdapterStaged,
    Failure,
    FailureKind,
    LoadAdapter,
    PlaceAdapter,
    Prefetch,
    ReleaseAdapter,
)
from scheduler import failures
from scheduler.adapter import (
    Adapter,
    copy_of,
    not_started,
    outdated_key,
    packed_bytes,
    worth,
)
from scheduler.adapter_pool import AdapterPool, Extent, Move, Place
from scheduler.policy import Policy, by_order, discard
from scheduler.sequence import Sequence

MAX_BYTES_AHEAD = 32 << 20  # about 0.6 ms from host memory
MAX_LOADS = 32  # of one tenant that are loading, or staged and without room
MAX_TRIES = 8  # adapters that room is looked for in, at a time
MAX_MOVES = 32  # for one adapter, unless it has no room otherwise: each is a few launches

Failed = list[tuple[Sequence, Failure]]


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
        revalidate_seconds: float,
    ) -> None:
        self._policy = policy
        self._send = send
        self._load_seconds = load_seconds
        self._revalidate_seconds = revalidate_seconds
        self._pool = AdapterPool(nbytes=0, slots=0)  # until the worker is ready
        self._adapter_of: dict[AdapterKey, Adapter] = {}
        self._resident: dict[AdapterKey, Adapter] = {}  # those of them that have an extent
        self._outdated: list[Adapter] = []  # that sequences have started with
        self._retired = 0  # how many there ever were
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
        started_with = self._outdated_for(sequence)
        sequence.adapter = sequence.named if started_with is None else started_with.key
        self._policy.join(sequence)
        key = sequence.adapter
        if key is None:
            return
        adapter = self._adapter_of.get(key)
        if adapter is None:
            adapter = self._adapter_of[key] = Adapter(key)
        if sequence.started is None:
            self._revalidate(adapter, sequence.adapter_token, now)
            self._doubt_if_old(adapter, now)
        insort(adapter.waiting, sequence, key=by_order)
        if adapter.staged is None and adapter.asked_by is None:
            self._want(adapter, sequence.tenant, now)
        elif adapter.loading and key not in self._load_deadline_of:
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
            self._drop_if_done(adapter)
        elif adapter.staged is None and adapter.asked_by is None:
            self._want_less(adapter, sequence.tenant)
        elif adapter.staged is not None and not adapter.waiting:
            self._give_up(adapter)

    def prefetch(self, message: Prefetch, now: float) -> None:
        """Somebody will want this adapter soon."""
        adapter = self._adapter_of.get(message.adapter)
        if adapter is not None:
            self._touch(adapter)
            self._revalidate(adapter, message.adapter_token, now)
        elif self._loads[message.tenant] < MAX_LOADS:
            adapter = self._adapter_of[message.adapter] = Adapter(message.adapter)
            self._load(adapter, message.tenant, message.adapter_token, now)

    # --- who runs ---

    def resident_at(self, key: AdapterKey) -> tuple[Extent, str]:
        """Where a resident adapter lies, and the digest of its content."""
        adapter = self._adapter_of[key]
        assert adapter.extent is not None
        assert adapter.staged is not None
        return adapter.extent, adapter.staged.content

    def pin(self, extent: Extent) -> None:
        """Keep a resident adapter where it is until `unpin`: somebody runs with it."""
        adapter = self._resident[extent.key]
        if not adapter.running:
            self.running_bytes += packed_bytes(adapter)
        adapter.running += 1
        adapter.pins += 1
        adapter.used = True

    def unpin(self, extent: Extent) -> None:
        adapter = self._resident[extent.key]
        self._touch(adapter)
        adapter.running -= 1
        if not adapter.running:
            self.running_bytes -= packed_bytes(adapter)
        self._let_go(adapter)

    # --- what the loader says, or does not ---

    def staged(self, message: AdapterStaged) -> None:
        """The adapter lies in the arena; from now on its lease is ours."""
        adapter = self._adapter_of[message.adapter]
        self._answered(adapter)
        adapter.confirmed_at = adapter.asked_at
        if adapter.staged is not None:
            if adapter.staged.content == message.content:
                self._send(ReleaseAdapter(message.adapter, message.arena_offset))
                self._clear(adapter)
                return
            adapter = self._replace(adapter)
        adapter.staged = message
        self._without_room.append(adapter)
        self._policy.block(adapter.key)
        self._room_may_be_found = True

    def failed(self, key: AdapterKey, failure: Failure, now: float) -> list[Sequence]:
        """The adapter cannot be had, or not any more. Returns those that fail with it."""
        adapter = self._adapter_of[key]
        self._answered(adapter)
        if adapter.staged is None:
            del self._adapter_of[key]
            self._load_is_over(adapter)
            return adapter.waiting
        if failure.kind == FailureKind.ADAPTER_UNAVAILABLE:
            return self._unconfirmed(adapter, now)
        refused = not_started(adapter)
        self._retire(adapter)
        return refused

    def overdue(self, now: float) -> list[Sequence]:
        """Those that wait for a load that should have been answered. A later answer is used."""
        sequences: list[Sequence] = []
        while self._load_deadline_of:
            key, deadline = next(iter(self._load_deadline_of.items()))
            if deadline > now:
                break
            del self._load_deadline_of[key]
            sequences += self._unconfirmed(self._adapter_of[key], now)
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
        while self._room_may_be_found and self._without_room:
            overdue = self._policy.overdue(now)
            before = len(self._without_room)
            for adapter in self._in_turn() if overdue is None else [self._adapter_of[overdue]]:
                if not self._pool.holds(packed_bytes(adapter)):
                    failed += self._refuse(adapter)
                elif (message := self._find_room(adapter, now, failed)) is not None:
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

    def _admit(self) -> None:
        """Let those start whose adapter has arrived, or is about to."""
        ahead = 0
        for adapter, moved in self._arriving:
            if ahead > MAX_BYTES_AHEAD:
                return
            ahead += packed_bytes(adapter)
            for one in (adapter, *moved):
                if not one.admits:
                    one.admits = True
                    if not one.in_doubt:
                        self._policy.admit(one.key)

    def _let_go(self, adapter: Adapter) -> None:
        adapter.pins -= 1
        self._room_may_be_found |= adapter.pins == 0
        self._drop_if_done(adapter)

    def _shut(self, adapter: Adapter) -> None:
        """Let nobody start with it."""
        adapter.admits = False
        self._policy.shut(adapter.key)

    def _find_room(self, adapter: Adapter, now: float, failed: Failed) -> PlaceAdapter | None:
        """Sequences that cannot go on without what is evicted for it are added to `failed`."""
        place = self._make_place(adapter, now)
        if place is None:
            return None
        adapter.extent = place.extent
        adapter.used = False
        self._resident[adapter.key] = adapter
        self._needs_no_room(adapter)
        self._touch(adapter)
        message = PlaceAdapter(copy_of(adapter), tuple(self._move(move) for move in place.moves))
        moved = [self._adapter_of[move.extent.key] for move in place.moves]
        for one in moved:
            if one.pins == 0:
                self._shut(one)  # it is moved behind the copies that are on their way
        for one in (adapter, *moved):
            one.pins += 1
        self._arriving.append(_Placing(adapter, moved))
        for extent in place.evicted:
            failed += self._evicted(self._adapter_of[extent.key], now)
        return message

    def _make_place(self, adapter: Adapter, now: float) -> Place | None:
        others = self._resident.values()
        overdue = self._policy.overdue(now) == adapter.key
        candidates = [
            one
            for one in others
            if not one.pins and (overdue or self._makes_room(one, adapter, now))
        ]
        candidates.sort(key=worth)
        evictable = [one.extent for one in candidates if one.extent is not None]
        pinned = {other.extent for other in others if other.pins and other.extent is not None}
        nbytes = packed_bytes(adapter)
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

    def _evicted(self, adapter: Adapter, now: float) -> Failed:
        """It is loaded again for those that wait. What is outdated cannot be had again."""
        adapter.extent = None
        adapter.staged = None
        adapter.in_doubt = False  # it is loaded again before anybody starts with it
        del self._resident[adapter.key]
        self._shut(adapter)
        if adapter in self._outdated:
            self._forget(adapter)
            return [(one, failures.adapter_changed(adapter.key)) for one in adapter.waiting]
        if not adapter.waiting:
            self._forget(adapter)
        for tenant in {sequence.tenant: None for sequence in adapter.waiting}:
            self._want(adapter, tenant, now)
        return []

    def _refuse(self, adapter: Adapter) -> Failed:
        waiting = list(adapter.waiting)
        failure = failures.adapter_too_large(adapter.key, packed_bytes(adapter), self._pool.nbytes)
        self._give_up(adapter)
        return [(sequence, failure) for sequence in waiting]

    def _give_up(self, adapter: Adapter) -> None:
        """Forget a staged adapter."""
        self._release(adapter)
        self._needs_no_room(adapter)
        adapter.staged = None
        self._clear(adapter)
        self._forget(adapter)

    def _forget(self, adapter: Adapter) -> None:
        """It is absent, or loading while the loader owes an answer."""
        if adapter in self._outdated:
            self._outdated.remove(adapter)
        if not adapter.loading:
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
            self._forget(adapter)

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
        if not adapter.loading:  # else it was evicted while it was asked about
            self._question(adapter, token, now)

    def _question(self, adapter: Adapter, token: str | None, now: float) -> None:
        adapter.loading = True
        adapter.asked_at = now
        self._load_deadline_of[adapter.key] = now + self._load_seconds
        self._send(LoadAdapter(adapter.key, token))

    def _answered(self, adapter: Adapter) -> None:
        adapter.loading = False
        self._load_deadline_of.pop(adapter.key, None)
        for tenant in {sequence.tenant for sequence in adapter.waiting}:
            self._not_wanted(adapter, tenant)

    def _load_is_over(self, adapter: Adapter) -> None:
        """It has room, or cannot have any, or cannot be had."""
        if adapter.asked_by is None:
            return  # it has come in answer to a question about what was there before
        tenant, adapter.asked_by = adapter.asked_by, None
        self._loads[tenant] -= 1
        if not self._loads[tenant]:
            del self._loads[tenant]
        self._may_ask.add(tenant)

    # --- whether it is still to be had, and still the same ---

    def _revalidate(self, adapter: Adapter, token: str | None, now: float) -> None:
        """Ask about what is there, if it is time."""
        old = 2 * (now - adapter.confirmed_at) >= self._revalidate_seconds
        if old and adapter.staged is not None and not adapter.loading:
            self._question(adapter, token, now)

    def _doubt_if_old(self, adapter: Adapter, now: float) -> None:
        """Somebody joins: it is too late to start without the answer."""
        if adapter.staged is not None and now - adapter.confirmed_at >= self._revalidate_seconds:
            adapter.in_doubt = True
            self._policy.shut(adapter.key)

    def _clear(self, adapter: Adapter) -> None:
        """It is not in doubt, or nobody waits for it any more who has not started before."""
        if adapter.in_doubt:
            adapter.in_doubt = False
            if adapter.admits:
                self._policy.admit(adapter.key)

    def _unconfirmed(self, adapter: Adapter, now: float) -> list[Sequence]:
        """Its source cannot be asked. Returns those that fail.

        What everybody may read is served as it is. What needs a token is not, once it is in doubt.
        """
        if adapter.staged is None:
            return list(adapter.waiting)
        if not adapter.key.scope:
            adapter.confirmed_at = now
        refused = not_started(adapter) if adapter.key.scope and adapter.in_doubt else []
        self._clear(adapter)
        return refused

    def _replace(self, outdated: Adapter) -> Adapter:
        """Another content has come under the same key. Returns what takes its place."""
        adapter = Adapter(outdated.key)
        adapter.confirmed_at = outdated.confirmed_at
        adapter.waiting = not_started(outdated)
        self._retire(outdated)
        self._adapter_of[adapter.key] = adapter
        return adapter

    def _retire(self, adapter: Adapter) -> None:
        """Nobody starts with it any more, but for those that have started before."""
        key = adapter.key
        self._retired += 1
        adapter.key = outdated_key(key, self._retired)
        adapter.in_doubt = False
        adapter.waiting = [one for one in adapter.waiting if one.started is not None]
        self._adapter_of[adapter.key] = self._adapter_of.pop(key)
        self._outdated.append(adapter)
        self._policy.shut(key)
        self._policy.unblock(key)
        if adapter.extent is not None:
            adapter.extent.key = adapter.key
            self._resident[adapter.key] = self._resident.pop(key)
        else:
            self._policy.block(adapter.key)
        if adapter.admits:
            self._policy.admit(adapter.key)
        for sequence in adapter.waiting:
            self._policy.leave(sequence)
            sequence.adapter = adapter.key
            self._policy.join(sequence)
        self._drop_if_done(adapter)

    def _drop_if_done(self, adapter: Adapter) -> None:
        """An outdated adapter goes with the last that uses it."""
        if adapter.pins or adapter.waiting or adapter not in self._outdated:
            return
        if adapter.extent is None:
            self._give_up(adapter)
            return
        self._pool.evict(adapter.extent)
        del self._resident[adapter.key]
        self._shut(adapter)
        self._forget(adapter)
        self._room_may_be_found = True

    def _outdated_for(self, sequence: Sequence) -> Adapter | None:
        """What a sequence that was preempted has started with, if that is outdated and there."""
        for adapter in self._outdated:
            assert adapter.staged is not None
            started_with = (adapter.staged.adapter, adapter.staged.content)
            if started_with == (sequence.named, sequence.content):
                return adapter
        return None

    def _release(self, adapter: Adapter) -> None:
        assert adapter.staged is not None
        self._send(ReleaseAdapter(adapter.staged.adapter, adapter.staged.arena_offset))

    def _touch(self, adapter: Adapter) -> None:
        self._uses += 1
        adapter.last_used = self._uses
