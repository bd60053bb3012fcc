"""Which adapters are fetched, staged and leased: the decisions of this process, pure.

    load -> StartFetch -> fetched -> room in the arena -> StartPack -> packed -> AdapterStaged
                       -> unchanged ---------------------------------------------^
                       -> failed, or the deadline passes -> AdapterFailed

All loads of a key that come while it is fetched wait for that one fetch. Each load is answered
exactly once. A remote adapter's failure is remembered for a short time, by its whole key: other
tenants, whose token is another, ask for themselves. A staged adapter stays where it is when its
leases have come back, until its room is needed or it is to be forgotten; its source is asked again
by each load that finds nothing under way. When the last of an adapter has left the arena, the
scheduler is told.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from adapter_loader.arena_space import ArenaSpace
from adapter_loader.recent_failures import RecentFailures
from adapter_loader.refusals import failure, invalid, unavailable
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    Failure,
    ForgetAdapter,
    Leased,
    LoadAdapter,
    ReleaseAdapter,
)

Identity = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartFetch:
    """Open and check the adapter; report fetched, unchanged or failed."""

    key: AdapterKey
    token: str | None = field(repr=False)
    known: Identity | None  # report `unchanged` when it is this one


@dataclass(frozen=True, slots=True)
class StartPack:
    """Pack what was fetched into this extent; report packed or failed."""

    key: AdapterKey
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Close what was fetched; nobody waits for it."""

    key: AdapterKey


Action = StartFetch | StartPack | Discard
Answer = AdapterStaged | AdapterFailed | AdapterDropped


@dataclass(slots=True)
class _Fetch:
    """An adapter on its way. Holds one lease on `known` at first, and then one on `offset`."""

    known: int | None
    deadlines: list[float] = field(default_factory=list)  # one for each load that waits
    identity: Identity = ()
    nbytes: int = 0
    ranks: bytes = b""
    offset: int | None = None


@dataclass(slots=True)
class _Staged:
    """A packed adapter at some offset."""

    key: AdapterKey
    content: str
    identity: Identity
    nbytes: int
    ranks: bytes
    leases: int = 0  # given to the scheduler


class Core:
    """Inputs are named after what happened; `now` is in seconds of any clock.

    load_seconds      a load that takes longer has failed
    remember_seconds  a remote adapter that has failed is not asked for again for so long
    """

    def __init__(
        self, *, arena_bytes: int, load_seconds: float, remember_seconds: float = 0
    ) -> None:
        self._space = ArenaSpace(arena_bytes)
        self._load_seconds = load_seconds
        self._failures = RecentFailures(remember_seconds)
        self._fetches: dict[AdapterKey, _Fetch] = {}
        self._waiting: list[AdapterKey] = []  # fetched, no room yet; the oldest first
        self._forgetting: dict[AdapterKey, None] = {}  # to be answered once nothing is left
        self._staged: dict[int, _Staged] = {}
        self._current: dict[AdapterKey, int] = {}  # the offset of a key's newest content
        self._actions: list[Action] = []
        self._outbox: list[Answer] = []
        self.evictions = 0  # staged adapters that had to go for others, since the start

    @property
    def used_bytes(self) -> int:
        return self._space.used_bytes

    @property
    def staged(self) -> int:
        return len(self._staged)

    def load(self, message: LoadAdapter, now: float) -> None:
        key = message.adapter
        fetch = self._fetches.get(key)
        if fetch is None:
            reason = self._failures.find(key, now)
            if reason is not None:
                self._fail(key, (now,), reason)
                return
            known = self._current.get(key)
            fetch = self._fetches[key] = _Fetch(known)
            if known is not None:
                self._space.lease(known)
            identity = None if known is None else self._staged[known].identity
            self._actions.append(StartFetch(key, message.adapter_token, identity))
        fetch.deadlines.append(now + self._load_seconds)

    def leased(self, message: Leased) -> None:
        """Keep what the scheduler has from a predecessor until its leases have come back. What it
        is worth is not known, so it is of no use to loads."""
        for lease in message.leases:
            self._space.take(lease.arena_offset, lease.nbytes)
            self._staged[lease.arena_offset] = _Staged(
                lease.adapter, "", (), lease.nbytes, b"", leases=1
            )

    def start_over(self) -> None:
        """For another scheduler: it has leased nothing, and waits for nothing. What is under way
        may serve it."""
        for offset, staged in list(self._staged.items()):
            while staged.leases:
                staged.leases -= 1
                self._give_back(offset)
        for key, fetch in list(self._fetches.items()):
            fetch.deadlines.clear()
            if key in self._waiting:
                self._waiting.remove(key)
                del self._fetches[key]
                self._actions.append(Discard(key))
        self._forgetting.clear()
        self._outbox.clear()

    def release(self, message: ReleaseAdapter) -> bool:
        """Take a lease back; False when there is no such lease."""
        staged = self._staged.get(message.arena_offset)
        if staged is None or staged.key != message.adapter or not staged.leases:
            return False
        staged.leases -= 1
        self._give_back(message.arena_offset)
        self._place_waiting()
        return True

    def forget(self, message: ForgetAdapter) -> None:
        """Keep nothing of the adapter. Answered once the arena holds nothing of it.

        What is leased stays until its leases have come back. A fetch goes on for the loads that
        wait for it; what comes of it without any is dropped. So is what is known of its failure.
        """
        key = message.adapter
        self._failures.forget(key)
        self._forgetting[key] = None
        offset = self._current.pop(key, None)
        if offset is not None and not self._space.is_leased(offset):
            self._free(offset)
        self._place_waiting()

    def unchanged(self, key: AdapterKey) -> None:
        """The source still has what is staged."""
        fetch = self._fetches.pop(key)
        assert fetch.known is not None, "unchanged is reported for a known identity only"
        self._answer(fetch, fetch.known)
        self._give_back(fetch.known)
        self._place_waiting()

    def fetched(self, key: AdapterKey, identity: Identity, nbytes: int, ranks: bytes) -> None:
        """The adapter is open and checked, and wants nbytes."""
        fetch = self._fetches[key]
        self._give_back_known(fetch)
        fetch.identity, fetch.nbytes, fetch.ranks = identity, nbytes, ranks
        if not fetch.deadlines:
            del self._fetches[key]
            self._actions.append(Discard(key))
        elif nbytes > self._space.capacity:
            error = invalid(
                f"it takes {nbytes} bytes, more than the whole arena (arena_bytes: "
                f"{self._space.capacity})"
            )
            self._actions.append(Discard(key))
            self._end(key, failure(key, error))
        else:
            self._waiting.append(key)
        self._place_waiting()

    def packed(self, key: AdapterKey, content: str) -> None:
        """The adapter lies in its extent."""
        fetch = self._fetches.pop(key)
        assert fetch.offset is not None, "packed is reported after StartPack only"
        offset = fetch.offset
        self._staged[offset] = _Staged(key, content, fetch.identity, fetch.nbytes, fetch.ranks)
        outdated = self._current.pop(key, None)
        if key not in self._forgetting:
            self._current[key] = offset
        if outdated is not None and not self._space.is_leased(outdated):
            self._free(outdated)
        self._answer(fetch, offset)
        self._give_back(offset)
        self._place_waiting()

    def failed(self, key: AdapterKey, reason: Failure, now: float) -> None:
        """The adapter cannot be had; nothing of it is left open."""
        if key.parts[0].source != "local":  # a folder is mended by its owner
            self._failures.add(key, reason, now)
        self._end(key, reason)

    def expire(self, now: float) -> None:
        """Fail the loads whose time is over. A fetch goes on; it may serve later loads."""
        for key, fetch in list(self._fetches.items()):
            late = [deadline for deadline in fetch.deadlines if deadline <= now]
            if not late:
                continue
            fetch.deadlines = [deadline for deadline in fetch.deadlines if deadline > now]
            what = "found no room in the arena" if key in self._waiting else "was not loaded"
            error = unavailable(f"it {what} within {self._load_seconds:g} seconds")
            self._fail(key, late, failure(key, error))
            if not fetch.deadlines and key in self._waiting:
                self._waiting.remove(key)
                del self._fetches[key]
                self._actions.append(Discard(key))

    def next_deadline(self) -> float | None:
        """When `expire` has something to do, if nothing else happens."""
        return min(
            (min(fetch.deadlines) for fetch in self._fetches.values() if fetch.deadlines),
            default=None,
        )

    def take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def take_outbox(self) -> list[Answer]:
        self._answer_forgets()
        outbox, self._outbox = self._outbox, []
        return outbox

    def _end(self, key: AdapterKey, reason: Failure) -> None:
        fetch = self._fetches.pop(key)
        self._give_back_known(fetch)
        if fetch.offset is not None:
            self._space.release(fetch.offset)
            self._space.free(fetch.offset)
        self._fail(key, fetch.deadlines, reason)
        self._place_waiting()

    def _answer(self, fetch: _Fetch, offset: int) -> None:
        """Lease the extent to each load that waits."""
        staged = self._staged[offset]
        for _ in fetch.deadlines:
            staged.leases += 1
            self._space.lease(offset)
            self._outbox.append(
                AdapterStaged(staged.key, staged.content, offset, staged.nbytes, staged.ranks)
            )

    def _fail(self, key: AdapterKey, loads: Iterable[float], reason: Failure) -> None:
        self._outbox.extend(AdapterFailed(key, reason) for _ in loads)

    def _give_back_known(self, fetch: _Fetch) -> None:
        if fetch.known is not None:
            self._give_back(fetch.known)
            fetch.known = None

    def _give_back(self, offset: int) -> None:
        """End one lease; outdated content that nobody leases goes at once."""
        last = self._space.release(offset)
        if last and self._current.get(self._staged[offset].key) != offset:
            self._free(offset)

    def _free(self, offset: int) -> None:
        """Give the room of a staged adapter back; nobody leases it."""
        self._space.free(offset)
        self._gone(offset)

    def _gone(self, offset: int) -> None:
        """Forget what was staged there."""
        key = self._staged.pop(offset).key
        if self._current.get(key) == offset:
            del self._current[key]
        if key not in self._forgetting and not self._lies_in_arena(key):
            self._outbox.append(AdapterDropped(key))

    def _answer_forgets(self) -> None:
        for key in [key for key in self._forgetting if not self._lies_in_arena(key)]:
            del self._forgetting[key]
            self._outbox.append(AdapterDropped(key))

    def _lies_in_arena(self, key: AdapterKey) -> bool:
        fetch = self._fetches.get(key)
        if fetch is not None and fetch.offset is not None:
            return True
        return any(staged.key == key for staged in self._staged.values())

    def _place_waiting(self) -> None:
        """Give room to what waits for it. A small one may pass a large one, whose time is bound."""
        for key in list(self._waiting):
            fetch = self._fetches[key]
            allocation = self._space.allocate(fetch.nbytes)
            if allocation is None:
                continue
            self._waiting.remove(key)
            self.evictions += len(allocation.evicted)
            for offset in allocation.evicted:
                self._gone(offset)
            fetch.offset = allocation.offset
            self._actions.append(StartPack(key, allocation.offset, fetch.nbytes))
