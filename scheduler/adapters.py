"""The way of each adapter: asked for, staged in the arena, resident in the pool, evicted.

    wanted  --asked for-->  loading  --staged-->  staged  --place-->  resident  --evicted--> wanted
       |                       |                    |                                     or absent
       +-----------------------+----- failed, too large, or waited for by nobody without room ->

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

Administrators can want an adapter, which then counts as waited for though nobody's turn is; keep
one, which is then not evicted, but may be moved; and retire one:

    nobody starts with it -> nobody runs with it, nor is its copy or load on the way -> evicted
    -> forgotten by the loader -> absent, or loaded anew for those that wait

Copies arrive one after the other. Sequences may start with an adapter whose copy is the next to
arrive, since a step waits for it layer by layer; but not behind MAX_BYTES_AHEAD of others, which
the step would hold up all its rows for. No more than MAX_BYTES_ARRIVING are on their way: who gets
room after that is decided when it is time, and until then others keep theirs.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.messages import (
    AdapterKey,
    AdapterMove,
    AdapterStaged,
    Failure,
    FailureKind,
    ForgetAdapter,
    Leased,
    LoadAdapter,
    PlaceAdapter,
    Prefetch,
    ReleaseAdapter,
)
from scheduler import failures
from scheduler.adapter import Adapter, Want
from scheduler.adapter_pool import AdapterPool, Extent, Move, Place
from scheduler.loads import Loads
from scheduler.policy import Policy, by_order, discard
from scheduler.sequence import Sequence

MAX_BYTES_AHEAD = 32 << 20  # about 0.6 ms from host memory
MAX_BYTES_ARRIVING = 512 << 20  # about 10 ms; nobody is evicted for what would be copied later
MAX_TRIES = 8  # adapters that room is looked for in, at a time
ADMINISTRATORS = "administrators"  # a tenant that no digest is
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
        send: Callable[[LoadAdapter | Leased | ReleaseAdapter | ForgetAdapter], None],
        load_seconds: float,
        revalidate_seconds: float,
    ) -> None:
        self._policy = policy
        self._send = send
        self._revalidate_seconds = revalidate_seconds
        self._pool = AdapterPool(nbytes=0, slots=0)  # until the worker is ready
        self._adapter_of: dict[AdapterKey, Adapter] = {}
        self._resident: dict[AdapterKey, Adapter] = {}  # those of them that have an extent
        self._unpinned: dict[AdapterKey, Adapter] = {}  # those of these that are not pinned
        self._outdated: list[Adapter] = []  # that sequences have started with
        self._outdated_before = 0  # how many there ever were
        self._kept: set[Adapter] = set()
        self._loads = Loads(policy=policy, send=send, load_seconds=load_seconds)
        self._without_room: dict[Adapter, None] = {}  # staged, not resident
        self._for_nobody: dict[Adapter, None] = {}  # those of them without a sequence at some time
        self._arriving: deque[_Placing] = deque()  # in order
        self._room_may_be_found = False
        self._loader_is_there = False
        self._uses = 0
        self.running_bytes = 0  # of those that sequences run with
        self.evictions = 0  # for others, since the start

    def __iter__(self) -> Iterator[AdapterKey]:
        """All that are not absent."""
        return (key for key, adapter in self._adapter_of.items() if not adapter.is_outdated)

    @property
    def resident(self) -> int:
        return len(self._resident)

    @property
    def pool_used_bytes(self) -> int:
        return self._pool.used_bytes

    @property
    def kept_bytes(self) -> int:
        kept = [one.extent for one in self._kept]
        return sum(extent.end - extent.offset for extent in kept if extent is not None)

    @property
    def kept(self) -> int:
        return sum(adapter.extent is not None for adapter in self._kept)

    def is_kept(self, key: AdapterKey) -> bool:
        return key in self._resident and self._resident[key].kept

    def pins(self, key: AdapterKey) -> int:
        """What keeps it where it is."""
        return self._resident[key].pins if key in self._resident else 0

    def by_use(self) -> tuple[list[AdapterKey], list[AdapterKey]]:
        """Those that are resident, and those that are not and are waited for; the latest first."""
        known = [one for one in self._adapter_of.values() if not one.is_outdated]
        known.sort(key=lambda one: one.last_used, reverse=True)
        resident = [one.key for one in known if one.extent is not None]
        return resident, [one.key for one in known if one.extent is None and one.is_waited_for]

    def is_resident(self, key: AdapterKey) -> bool:
        return key in self._resident

    # --- processes that start, for the first time or again ---

    def worker_ready(self, *, pool_bytes: int, slots: int) -> None:
        """Its pool is empty."""
        self._pool = AdapterPool(nbytes=pool_bytes, slots=slots)
        self._room_may_be_found = True

    def pool_lost(self, now: float) -> Failed:
        """The worker has died, and nobody runs. To be called once those that ran wait again.
        Returns those that fail with what cannot be had again."""
        arriving = {placing.adapter for placing in self._arriving}
        residents = list(self._resident.values())
        self._pool = AdapterPool(nbytes=0, slots=0)
        self._resident.clear()
        self._unpinned.clear()
        self._arriving.clear()
        self.running_bytes = 0
        for adapter in residents:
            adapter.extent = None
            adapter.pins = adapter.running = 0
            self._shut(adapter)
            if adapter in arriving:  # so its lease is ours still
                self._lacks_room(adapter)
            else:
                adapter.staged = None
                adapter.in_doubt = False
        failed: Failed = []
        for adapter in sorted(residents, key=lambda one: one.is_outdated):  # what waits for these
            failed += self._has_lost_its_place(adapter, now)
        return failed

    def loader_lost(self) -> None:
        """It is told nothing until another has started."""
        self._loader_is_there = False
        self._loads.loader_lost()

    def loader_started(self) -> None:
        """Tell it what is leased, ask for what is wanted, and have it forget what is to go."""
        self._loader_is_there = True
        leased = [*self._without_room, *(placing.adapter for placing in self._arriving)]
        if leased:
            self._tell(Leased(tuple(one.lease() for one in leased)))
        self._loads.loader_started()
        for adapter in self._adapter_of.values():
            if adapter.retiring and not self._is_held(adapter):
                self._tell(ForgetAdapter(adapter.key))

    def _has_lost_its_place(self, adapter: Adapter, now: float) -> Failed:
        """In the pool; it may be staged still. What is outdated cannot be had again."""
        if adapter.retiring:
            self._retire_further(adapter)
        elif adapter.staged is not None:
            if not adapter.is_waited_for:
                self._give_up(adapter)
        elif adapter.is_outdated:
            self._forget(adapter)
            return [(one, failures.adapter_changed(adapter.named)) for one in adapter.waiting]
        else:
            self._bring(adapter, now)
        return []

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
        if sequence.started is None and not adapter.retiring:
            self._revalidate(adapter, sequence.adapter_token, now, sequence.trace)
            self._doubt_if_old(adapter, now)
        insort(adapter.waiting, sequence, key=by_order)
        if adapter.staged is None and adapter.asked_by is None:
            self._loads.want(adapter, sequence.tenant, now)
        elif adapter.loading:
            self._loads.expect(adapter, now)

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
        elif adapter.retiring:
            return
        elif adapter.staged is None and adapter.asked_by is None:
            self._loads.want_less(adapter, sequence.tenant)
            if not adapter.is_waited_for:
                self._forget(adapter)
        elif adapter.staged is not None and not adapter.waiting:
            self._for_nobody[adapter] = None
            if not adapter.is_waited_for:
                self._give_up(adapter)

    def prefetch(self, message: Prefetch, now: float) -> None:
        """Somebody will want this adapter soon."""
        adapter = self._adapter_of.get(message.adapter)
        if adapter is not None:
            self._touch(adapter)
            if not adapter.retiring:
                self._revalidate(adapter, message.adapter_token, now, message.trace)
        elif self._loads.may_ask(message.tenant):
            adapter = self._adapter_of[message.adapter] = Adapter(message.adapter)
            token, trace = message.adapter_token, message.trace
            self._loads.load(adapter, message.tenant, token, now, trace)

    # --- what administrators want ---

    def want(self, key: AdapterKey, token: str | None, now: float) -> Want:
        """Bring it into the pool, and do not give it up until `unwant`."""
        want = Want(key, token)
        adapter = self._adapter_of.get(key)
        if adapter is None:
            adapter = self._adapter_of[key] = Adapter(key)
        adapter.wants.append(want)
        if adapter.extent is None:
            self._bring(adapter, now)
        return want

    def unwant(self, want: Want) -> None:
        adapter = self._adapter_of.get(want.key)
        if adapter is None or want not in adapter.wants:
            return  # it has failed
        adapter.wants.remove(want)
        waits_for_room = adapter.staged is not None and adapter.extent is None
        if waits_for_room and not adapter.is_waited_for:
            self._give_up(adapter)

    def has_arrived(self, key: AdapterKey) -> bool:
        """Whether it is resident, all of it, and stays so for a while."""
        adapter = self._resident.get(key)
        if adapter is None or adapter.retiring:
            return False
        return all(placing.adapter is not adapter for placing in self._arriving)

    def keep(self, key: AdapterKey, token: str | None, fraction: float) -> bool:
        """Do not evict this resident adapter; False if it took too much of the pool's bytes or
        slots, with what is kept already."""
        adapter = self._resident[key]
        if adapter.kept:
            return True
        self._keep(adapter, token)
        pool = self._pool
        if self.kept_bytes > fraction * pool.nbytes or self.kept > fraction * pool.slots:
            self._unkeep(adapter)
            return False
        self._room_may_be_found = True  # some may never have any now
        return True

    def unkeep(self, key: AdapterKey) -> bool:
        """Let it be evicted; False if it was not kept."""
        adapter = self._adapter_of.get(key)
        if adapter is None or not adapter.kept:
            return False
        self._unkeep(adapter)
        self._room_may_be_found = True
        return True

    def _keep(self, adapter: Adapter, token: str | None) -> None:
        adapter.kept = True
        adapter.kept_token = token
        self._kept.add(adapter)

    def _unkeep(self, adapter: Adapter) -> None:
        adapter.kept = False
        self._kept.discard(adapter)

    def retire(self, key: AdapterKey) -> None:
        """Take it out of pool and arena, as soon as nobody uses it."""
        adapter = self._adapter_of.get(key)
        if adapter is None:
            adapter = self._adapter_of[key] = Adapter(key)
        if not adapter.retiring:
            adapter.retiring = True
            self._unkeep(adapter)
            self._shut(adapter)
            self._retire_further(adapter)

    def is_retiring(self, key: AdapterKey) -> bool:
        adapter = self._adapter_of.get(key)
        return adapter is not None and adapter.retiring

    def dropped(self, key: AdapterKey, now: float) -> None:
        """The arena holds nothing of it any more."""
        adapter = self._adapter_of.get(key)
        if adapter is not None and adapter.retiring and not self._is_held(adapter):
            adapter.retiring = False
            self._bring(adapter, now)

    def _retire_further(self, adapter: Adapter) -> None:
        """Evict it, or give its lease back, then have it forgotten; nothing while it is used."""
        if adapter.extent is not None and adapter.pins == 0:
            self._take_out(adapter)
        elif adapter.extent is None and adapter.staged is not None:
            self._release(adapter)
            self._needs_no_room(adapter)
            adapter.staged = None
            adapter.in_doubt = False  # as where it has left the pool
        if not self._is_held(adapter):
            self._tell(ForgetAdapter(adapter.key))

    def _is_held(self, adapter: Adapter) -> bool:
        """Whether it, or an older content of it, is still there or on its way."""
        return adapter.is_held or any(one.named == adapter.key for one in self._outdated)

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
            self.running_bytes += adapter.nbytes
        adapter.running += 1
        self._hold(adapter)
        adapter.used = True

    def unpin(self, extent: Extent) -> None:
        adapter = self._resident[extent.key]
        self._touch(adapter)
        adapter.running -= 1
        if not adapter.running:
            self.running_bytes -= adapter.nbytes
        self._let_go(adapter)

    # --- what the loader says, or does not ---

    def staged(self, message: AdapterStaged) -> bool:
        """The adapter lies in the arena; from now on its lease is ours. Returns whether that is
        news, and not the answer to a question about what was there."""
        adapter = self._adapter_of[message.adapter]
        self._loads.answered(adapter)
        adapter.confirmed_at = adapter.asked_at
        if adapter.retiring:
            self._tell(ReleaseAdapter(message.adapter, message.arena_offset))
            self._loads.over(adapter)
            self._retire_further(adapter)
            return True
        if adapter.staged is not None:
            if adapter.staged.content == message.content:
                self._tell(ReleaseAdapter(message.adapter, message.arena_offset))
                self._clear(adapter)
                return False
            adapter = self._replace(adapter)
        adapter.staged = message
        self._lacks_room(adapter)
        self._room_may_be_found = True
        return True

    def failed(self, key: AdapterKey, failure: Failure, now: float) -> list[Sequence]:
        """The adapter cannot be had, or not any more. Returns those that fail with it."""
        adapter = self._adapter_of[key]
        self._loads.answered(adapter)
        if adapter.staged is None:
            self._loads.over(adapter)
            self._unkeep(adapter)
            adapter.fail_wants(failure)
            waiting = list(adapter.waiting)
            if adapter.retiring:
                self._retire_further(adapter)
            else:
                del self._adapter_of[key]
            return waiting
        if adapter.retiring:
            self._retire_further(adapter)
            return []
        if failure.kind == FailureKind.ADAPTER_UNAVAILABLE:
            return self._unconfirmed(adapter, now)
        refused = adapter.not_started()
        self._unkeep(adapter)
        adapter.fail_wants(failure)
        self._outdate(adapter)
        return refused

    def overdue(self, now: float) -> list[Sequence]:
        """Those that wait for a load that should have been answered. A later answer is used."""
        sequences: list[Sequence] = []
        for key in self._loads.overdue(now):
            sequences += self._unconfirmed(self._adapter_of[key], now)
        return sequences

    def next_deadline(self) -> float | None:
        return self._loads.next_deadline()

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
            too_large = math.inf  # for what may be evicted for those whose turn comes first
            room = self._room_beside_kept()
            for adapter in self._in_turn() if overdue is None else [self._adapter_of[overdue]]:
                nbytes = adapter.nbytes
                if nbytes > room:
                    failed += self._refuse(adapter)
                    continue
                if nbytes < too_large:
                    message = self._find_room(adapter, now, overdue, failed)
                    if message is not None:
                        placements.append(message)
                        if not self._may_copy():
                            break
                        room = self._room_beside_kept()
                        continue
                    too_large = nbytes
                if not adapter.is_waited_for:
                    self._give_up(adapter)
            # where all of these are out of the way it is the others' turn
            found_too_little = too_large < math.inf and overdue is None
            self._room_may_be_found = len(self._without_room) < before and not found_too_little
        self._admit()
        self._loads.ask(now)
        return placements, failed

    def _room_beside_kept(self) -> int:
        """The most bytes that an adapter may have to fit beside those that are kept."""
        if not self._kept and self._pool.slots:  # as mostly
            return self._pool.nbytes
        return self._pool.largest(beside=self.kept_bytes) if self.kept < self._pool.slots else -1

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
        return sum([one.adapter.nbytes for one in self._arriving]) < MAX_BYTES_ARRIVING

    def _admit(self) -> None:
        """Let those start whose adapter has arrived, or is about to."""
        ahead = 0
        for adapter, moved in self._arriving:
            if ahead > MAX_BYTES_AHEAD:
                return
            ahead += adapter.nbytes
            for one in (adapter, *moved):
                if not one.admits and not one.retiring:
                    one.admits = True
                    if not one.in_doubt:
                        self._policy.admit(one.key)

    def _hold(self, adapter: Adapter) -> None:
        adapter.pins += 1
        self._unpinned.pop(adapter.key, None)

    def _let_go(self, adapter: Adapter) -> None:
        adapter.pins -= 1
        if adapter.pins:
            return
        self._unpinned[adapter.key] = adapter
        self._room_may_be_found = True
        self._drop_if_done(adapter)
        if adapter.retiring:
            self._retire_further(adapter)

    def _shut(self, adapter: Adapter) -> None:
        """Let nobody start with it."""
        adapter.admits = False
        self._policy.shut(adapter.key)

    def _find_room(
        self, adapter: Adapter, now: float, overdue: AdapterKey | None, failed: Failed
    ) -> PlaceAdapter | None:
        """Sequences that cannot go on without what is evicted for it are added to `failed`."""
        place = self._make_place(adapter, now, anybody=overdue == adapter.key)
        if place is None:
            return None
        adapter.extent = place.extent
        adapter.used = False
        self._resident[adapter.key] = adapter
        self._needs_no_room(adapter)
        self._touch(adapter)
        message = PlaceAdapter(adapter.copy(), tuple(self._move(move) for move in place.moves))
        moved = [self._adapter_of[move.extent.key] for move in place.moves]
        for one in moved:
            if one.pins == 0:
                self._shut(one)  # it is moved behind the copies that are on their way
        for one in (adapter, *moved):
            self._hold(one)
        self._arriving.append(_Placing(adapter, moved))
        for extent in place.evicted:
            failed += self._evicted(self._adapter_of[extent.key], now)
        return message

    def _make_place(self, adapter: Adapter, now: float, *, anybody: bool) -> Place | None:
        """anybody: evict whoever is not pinned"""
        candidates = [
            one
            for one in self._unpinned.values()
            if not one.kept and (anybody or self._makes_room(one, adapter, now))
        ]
        candidates.sort(key=Adapter.worth)
        evictable = [one.extent for one in candidates if one.extent is not None]
        nbytes = adapter.nbytes
        if evictable and (place := self._pool.replace(adapter.key, nbytes, evictable[0])):
            return place
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
        first = [self._adapter_of[key] for key in self._policy.blocked_in_turn(MAX_TRIES)]
        return first + [adapter for adapter in self._for_nobody if not adapter.waiting]

    def _lacks_room(self, adapter: Adapter) -> None:
        """It is staged, and not resident."""
        self._without_room[adapter] = None
        if not adapter.waiting:
            self._for_nobody[adapter] = None
        self._policy.block(adapter.key)

    def _needs_no_room(self, adapter: Adapter) -> None:
        """It has got room, or is given up."""
        del self._without_room[adapter]
        self._for_nobody.pop(adapter, None)
        self._policy.unblock(adapter.key)
        self._loads.over(adapter)

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
        """It is loaded again for those that wait."""
        self.evictions += 1
        self._left_the_pool(adapter)
        return self._has_lost_its_place(adapter, now)

    def _take_out(self, adapter: Adapter) -> None:
        """Of the pool, for nobody in particular."""
        assert adapter.extent is not None
        self._pool.evict(adapter.extent)
        self._left_the_pool(adapter)
        self._room_may_be_found = True

    def _left_the_pool(self, adapter: Adapter) -> None:
        adapter.extent = None
        adapter.staged = None
        adapter.in_doubt = False  # it is loaded again before anybody starts with it
        del self._resident[adapter.key]
        del self._unpinned[adapter.key]
        self._shut(adapter)

    def _bring(self, adapter: Adapter, now: float) -> None:
        """Ask for it on behalf of all that wait; without any it is absent."""
        if not adapter.is_waited_for:
            self._forget(adapter)
            return
        wanted = adapter.wants or adapter.kept
        if wanted and adapter.asked_by is None and not adapter.retiring:
            token = adapter.wants[0].token if adapter.wants else adapter.kept_token
            self._loads.load(adapter, ADMINISTRATORS, token, now)
        for tenant in {sequence.tenant: None for sequence in adapter.waiting}:
            self._loads.want(adapter, tenant, now)

    def _refuse(self, adapter: Adapter) -> Failed:
        waiting = list(adapter.waiting)
        failure = failures.adapter_too_large(
            adapter.named, adapter.nbytes, self._pool.nbytes, self.kept_bytes
        )
        self._unkeep(adapter)
        adapter.fail_wants(failure)
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
        if not adapter.loading:
            del self._adapter_of[adapter.key]
        if not adapter.is_outdated:
            return
        self._outdated.remove(adapter)
        latest = self._adapter_of.get(adapter.named)
        if latest is not None and latest.retiring:
            self._retire_further(latest)

    # --- whether it is still to be had, and still the same ---

    def _revalidate(self, adapter: Adapter, token: str | None, now: float, trace: str) -> None:
        """Ask about what is there, if it is time."""
        old = 2 * (now - adapter.confirmed_at) >= self._revalidate_seconds
        if old and adapter.staged is not None and not adapter.loading:
            self._loads.question(adapter, token, now, trace)

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
        refused = adapter.not_started() if adapter.key.scope and adapter.in_doubt else []
        self._clear(adapter)
        return refused

    def _replace(self, outdated: Adapter) -> Adapter:
        """Another content has come under the same key. Returns what takes its place."""
        adapter = Adapter(outdated.key)
        adapter.confirmed_at = outdated.confirmed_at
        adapter.waiting = outdated.not_started()
        if outdated.kept:
            self._unkeep(outdated)
            self._keep(adapter, outdated.kept_token)
        adapter.wants, outdated.wants = outdated.wants, []
        self._outdate(outdated)
        self._adapter_of[adapter.key] = adapter
        return adapter

    def _outdate(self, adapter: Adapter) -> None:
        """Nobody starts with it any more, but for those that have started before."""
        key = adapter.key
        self._outdated_before += 1
        adapter.outdate(self._outdated_before)
        adapter.in_doubt = False
        adapter.waiting = [one for one in adapter.waiting if one.started is not None]
        self._adapter_of[adapter.key] = self._adapter_of.pop(key)
        self._outdated.append(adapter)
        self._policy.shut(key)
        self._policy.unblock(key)
        if adapter.extent is not None:
            adapter.extent.key = adapter.key
            self._resident[adapter.key] = self._resident.pop(key)
            if not adapter.pins:
                self._unpinned[adapter.key] = self._unpinned.pop(key)
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
        if adapter.pins or adapter.waiting or not adapter.is_outdated:
            return
        if adapter.extent is None:
            self._give_up(adapter)
            return
        self._take_out(adapter)
        self._forget(adapter)

    def _outdated_for(self, sequence: Sequence) -> Adapter | None:
        """What a sequence that was preempted has started with, if that is outdated and there."""
        for adapter in self._outdated:
            assert adapter.staged is not None
            if (adapter.named, adapter.staged.content) == (sequence.named, sequence.content):
                return adapter
        return None

    def _release(self, adapter: Adapter) -> None:
        assert adapter.staged is not None
        self._tell(ReleaseAdapter(adapter.named, adapter.staged.arena_offset))

    def _tell(self, message: Leased | ReleaseAdapter | ForgetAdapter) -> None:
        """The loader, if there is one; one that starts hears what holds then."""
        if self._loader_is_there:
            self._send(message)

    def _touch(self, adapter: Adapter) -> None:
        self._uses += 1
        adapter.last_used = self._uses
