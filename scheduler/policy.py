"""Who is next: first come, first served, among those that could start at once.

A request whose adapter is still on its way is passed by others, but not for ever: once its adapter
has lain in the arena for MAX_OVERTAKING_SECONDS without room in the device's pool, nobody that came
later and would hold an adapter in the pool starts before it.
"""

from bisect import bisect_left, insort
from operator import attrgetter

from scheduler.sequence import Sequence

MAX_OVERTAKING_SECONDS = 1.0

by_order = attrgetter("order")  # the least is the first to run and the last to be preempted


class ReadyQueue:
    """The sequences that lack nothing but a row and KV blocks."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=by_order)

    def discard(self, sequence: Sequence) -> None:
        discard(self._sequences, sequence)

    def first(self, barrier: Sequence | None) -> Sequence | None:
        """The next to start. Only those without an adapter may pass the barrier."""
        if barrier is None:
            return self._sequences[0] if self._sequences else None
        for sequence in self._sequences:
            if sequence.order < barrier.order or sequence.adapter is None:
                return sequence
        return None


def discard(ordered: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a list in order, if it is there."""
    index = bisect_left(ordered, sequence.order, key=by_order)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]
