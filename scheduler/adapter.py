"""What the scheduler knows of one adapter, and what follows from that alone."""

import msgspec

from pipeline.messages import AdapterCopy, AdapterKey, AdapterStaged, Failure, Lease
from scheduler.adapter_pool import Extent
from scheduler.sequence import Sequence


class Want:
    """An administrator waits for an adapter, from `want` to `unwant`."""

    __slots__ = ("failure", "key", "token")

    def __init__(self, key: AdapterKey, token: str | None) -> None:
        self.key = key
        self.token = token
        self.failure: Failure | None = None  # why it will not come


class Adapter:
    """One content of an adapter that is not absent."""

    __slots__ = (
        "admits",
        "asked_at",
        "asked_by",
        "confirmed_at",
        "extent",
        "in_doubt",
        "kept",
        "kept_token",
        "key",
        "last_used",
        "loading",
        "named",
        "pins",
        "retiring",
        "running",
        "staged",
        "used",
        "waiting",
        "wants",
    )

    def __init__(self, key: AdapterKey) -> None:
        self.named = key  # what requests ask for
        self.key = key  # the same, until it is outdated
        self.waiting: list[Sequence] = []  # in order; those that want to start with it
        self.asked_by: str | None = None  # the tenant whose load it is, until it has room
        self.loading = False  # the loader owes an answer
        self.asked_at = 0.0  # when it was asked last
        self.confirmed_at = 0.0  # when it was asked what it has answered well
        self.in_doubt = False  # those that wait, wait for the loader's answer
        self.staged: AdapterStaged | None = None  # the latest answer of the loader
        self.extent: Extent | None = None  # while it is resident, or its copy is on its way
        self.admits = False  # those that wait may start, unless it is in doubt
        self.pins = 0
        self.running = 0  # those of the pins that are of sequences
        self.used = False  # somebody has started with it since it has its extent
        self.last_used = 0  # counts up over all adapters
        self.wants: list[Want] = []
        self.kept = False  # not to be evicted
        self.kept_token: str | None = None  # with which it is loaded again, if that has to be
        self.retiring = False  # on its way out of pool and arena

    @property
    def is_waited_for(self) -> bool:
        return bool(self.waiting or self.wants or self.kept)

    @property
    def is_outdated(self) -> bool:
        """Another content has taken its place for all who have not started with it."""
        return self.key != self.named

    @property
    def is_held(self) -> bool:
        """Whether it lies in the pool or the arena on our account, or is on its way there."""
        is_absent = self.extent is None and self.staged is None
        return not is_absent or self.asked_by is not None or self.loading

    @property
    def nbytes(self) -> int:
        """Its packed size; it must be staged."""
        assert self.staged is not None
        return self.staged.nbytes

    def copy(self) -> AdapterCopy:
        """From the arena to the place it has got."""
        extent, staged = self.extent, self.staged
        assert extent is not None
        assert staged is not None
        return AdapterCopy(
            slot=extent.slot,
            pool_offset=extent.offset,
            arena_offset=staged.arena_offset,
            nbytes=staged.nbytes,
            ranks=staged.ranks,
        )

    def lease(self) -> Lease:
        """Of the extent that it is staged in."""
        assert self.staged is not None
        return Lease(self.named, self.staged.arena_offset, self.staged.nbytes)

    def worth(self) -> tuple[bool, int]:
        """Of a resident one: the first to be evicted has the least."""
        return (bool(self.waiting), self.last_used)

    def not_started(self) -> list[Sequence]:
        """Those that wait for their first start."""
        return [sequence for sequence in self.waiting if sequence.started is None]

    def outdate(self, number: int) -> None:
        """Give it a key that no request can ask for: what clients write is printable."""
        revision = f"{self.named.revision}\0{number}"
        self.key = msgspec.structs.replace(self.named, revision=revision)

    def fail_wants(self, failure: Failure) -> None:
        for want in self.wants:
            want.failure = failure
        self.wants = []
