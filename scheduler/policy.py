"""What the core asks of a policy: who waits, who starts next, and whose adapter gets room.

The product has one policy, fair_share.py; simulations bring others to compare it with.
"""

from bisect import bisect_left
from collections.abc import Iterable
from operator import attrgetter
from typing import Protocol

from pipeline.messages import AdapterKey
from scheduler.sequence import Sequence

Turn = tuple[float, float, float, float]  # compared as a whole: the least is next

by_order = attrgetter("order")  # the least is the last to be preempted


class Policy(Protocol):
    """Told of each sequence's way, and of each adapter's as far as it decides who can start.

    A sequence can start when it needs no adapter or its adapter is admitted.
    """

    def join(self, sequence: Sequence) -> None:
        """It waits to start: for the first time, or again after a preemption."""

    def leave(self, sequence: Sequence) -> None:
        """It does not wait any more; nothing happens if it did not."""

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        """A sequence that waits gets a row, and `tokens` of it have to be computed.

        `sequence.started` is None if that is its first start.
        """

    def end(self, sequence: Sequence) -> None:
        """Nothing more is heard of it, and it does not wait; it may never have joined."""

    def produced(self, sequences: Iterable[Sequence]) -> None:
        """A step gave each of them one token; some may have ended before."""

    def admit(self, key: AdapterKey) -> None:
        """Those that wait for this adapter may start."""

    def shut(self, key: AdapterKey) -> None:
        """They may not any more."""

    def block(self, key: AdapterKey) -> None:
        """This adapter lacks nothing but room in the device's pool."""

    def unblock(self, key: AdapterKey) -> None:
        """It has got room, or is not wanted any more; nothing happens if it was not blocked."""

    def first(self, now: float) -> Sequence | None:
        """The next to start."""

    def overdue(self, now: float) -> AdapterKey | None:
        """The blocked adapter that room has to be kept for, if there is one."""

    def turn(self, key: AdapterKey) -> Turn:
        """When the first of those that wait for this adapter is next; at least one must wait."""

    def blocked_in_turn(self, most: int) -> list[AdapterKey]:
        """The first, at most so many, of the blocked adapters that somebody waits for."""

    def yields(self, key: AdapterKey, other: AdapterKey, now: float) -> bool:
        """Whether an adapter that is not in use, but waited for, makes room for a blocked one."""


def discard(ordered: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a list in order, if it is there."""
    index = bisect_left(ordered, sequence.order, key=by_order)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]
