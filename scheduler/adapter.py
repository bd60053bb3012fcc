"""What the scheduler knows of one adapter, and what follows from that alone."""

import msgspec

from pipeline.messages import AdapterCopy, AdapterKey, AdapterStaged
from scheduler.adapter_pool import Extent
from scheduler.sequence import Sequence


class Adapter:
    """One content of an adapter that is not absent."""

    __slots__ = (
        "admits",
        "asked_at",
        "asked_by",
        "confirmed_at",
        "extent",
        "in_doubt",
        "key",
        "last_used",
        "loading",
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


def packed_bytes(adapter: Adapter) -> int:
    assert adapter.staged is not None
    return adapter.staged.nbytes


def copy_of(adapter: Adapter) -> AdapterCopy:
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


def not_started(adapter: Adapter) -> list[Sequence]:
    return [sequence for sequence in adapter.waiting if sequence.started is None]


def outdated_key(key: AdapterKey, number: int) -> AdapterKey:
    """No request can ask for it: what clients write is printable."""
    return msgspec.structs.replace(key, revision=f"{key.revision}\0{number}")


def worth(adapter: Adapter) -> tuple[bool, int]:
    """Of a resident adapter: the first to be evicted has the least."""
    return (bool(adapter.waiting), adapter.last_used)
