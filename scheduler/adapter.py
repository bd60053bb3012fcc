"""One adapter that the scheduler knows of: where it lies, and who waits for it."""

from pipeline.messages import AdapterCopy, AdapterKey, AdapterStaged, Failure
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
    """One adapter that is not absent."""

    __slots__ = (
        "admits",
        "asked_by",
        "extent",
        "kept",
        "key",
        "last_used",
        "pins",
        "retiring",
        "running",
        "staged",
        "used",
        "waiting",
        "wants",
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
        self.wants: list[Want] = []
        self.kept = False  # resident, and not to be evicted
        self.retiring = False

    @property
    def is_waited_for(self) -> bool:
        return bool(self.waiting or self.wants)

    @property
    def is_held(self) -> bool:
        """Whether it lies in the pool or the arena on our account, or is on its way there."""
        return not (self.extent is None and self.staged is None and self.asked_by is None)

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

    def worth(self) -> tuple[bool, int]:
        """Of a resident one: the first to be evicted has the least."""
        return (bool(self.waiting), self.last_used)

    def fail_wants(self, failure: Failure) -> None:
        for want in self.wants:
            want.failure = failure
        self.wants = []
