"""The rivals of the product's policy.

They get all that the product has beside its policy: loads and copies beside the steps, chunked
prefill, paged KV, loads in order of their turns. LoRAX has none of that while it loads, so it is
better here than it is.
"""

import heapq
import math
from bisect import insort
from collections.abc import Iterable

from pipeline.messages import AdapterKey
from scheduler.policy import Policy, Turn, by_order, discard
from scheduler.sequence import Sequence


class _Queues(Policy):
    """First come first served queues, one for each adapter; None is the base model's."""

    def __init__(self) -> None:
        self._waiting: dict[AdapterKey | None, list[Sequence]] = {}
        self._admitted: set[AdapterKey | None] = {None}
        self._ready: dict[AdapterKey | None, None] = {}  # admitted, with somebody who waits
        self._blocked: dict[AdapterKey, None] = {}

    def join(self, sequence: Sequence) -> None:
        waiting = self._waiting.setdefault(sequence.adapter, [])
        insort(waiting, sequence, key=by_order)
        if sequence.adapter in self._admitted:
            self._ready[sequence.adapter] = None

    def leave(self, sequence: Sequence) -> None:
        waiting = self._waiting.get(sequence.adapter)
        if waiting is None:
            return
        discard(waiting, sequence)
        if not waiting:
            del self._waiting[sequence.adapter]
            self._ready.pop(sequence.adapter, None)

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        self.leave(sequence)

    def end(self, sequence: Sequence) -> None:
        pass

    def produced(self, sequences: Iterable[Sequence]) -> None:
        pass

    def admit(self, key: AdapterKey) -> None:
        self._admitted.add(key)
        if key in self._waiting:
            self._ready[key] = None

    def shut(self, key: AdapterKey) -> None:
        self._admitted.discard(key)
        self._ready.pop(key, None)

    def block(self, key: AdapterKey) -> None:
        self._blocked[key] = None

    def unblock(self, key: AdapterKey) -> None:
        self._blocked.pop(key, None)

    def blocked_in_turn(self, most: int) -> list[AdapterKey]:
        waited_for = [key for key in self._blocked if key in self._waiting]
        return heapq.nsmallest(most, waited_for, key=self.turn)

    def _oldest(self, key: AdapterKey | None) -> int:
        return self._waiting[key][0].order


class FirstComeFirstServed(_Queues):
    """The oldest of those that can start. Who lacks an adapter is passed, for as long as it does.

    In the other kind the oldest of all holds up everybody while its adapter is loaded, so rows stay
    free at each load: this one is the stronger rival.
    """

    def first(self, now: float) -> Sequence | None:
        if not self._ready:
            return None
        return self._waiting[min(self._ready, key=self._oldest)][0]

    def overdue(self, now: float) -> AdapterKey | None:
        return None

    def turn(self, key: AdapterKey) -> Turn:
        return (self._oldest(key), 0.0, 0.0, 0.0)

    def yields(self, key: AdapterKey, other: AdapterKey, now: float) -> bool:
        return self._oldest(other) < self._oldest(key)


class TimeSlices(_Queues):
    """LoRAX's: some adapters are active, the others wait in line to be.

    An active one leaves when it has nobody left and others are in line. The one that has been
    active longest leaves for the end of the line after its slice, unless a request runs with it.
    The first in line becomes active when there is room and it has been fetched; until then those
    behind it wait as well. Of the active ones the oldest request is next, of those within their
    slice first.

    active_adapters  how many the pool has room for
    slice_seconds    adapter_cycle_time_s
    """

    def __init__(self, *, active_adapters: int, slice_seconds: float = 2.0) -> None:
        super().__init__()
        self._active_adapters = active_adapters
        self._slice_seconds = slice_seconds
        self._active: dict[AdapterKey | None, float] = {}  # since when; the longest first
        self._line: dict[AdapterKey | None, int] = {}  # its place, counted from the start
        self._places = 0
        self._fetched: set[AdapterKey | None] = {None}
        self._running: dict[AdapterKey | None, int] = {}
        self._idle: dict[AdapterKey | None, None] = {}  # active, not running, nobody waits

    def join(self, sequence: Sequence) -> None:
        super().join(sequence)
        key = sequence.adapter
        self._idle.pop(key, None)
        if key not in self._active and key not in self._line:
            self._stand_in_line(key)

    def leave(self, sequence: Sequence) -> None:
        super().leave(sequence)
        self._note_idle(sequence.adapter)

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        key = sequence.adapter
        if sequence.started is None:
            self._running[key] = self._running.get(key, 0) + 1
        super().start(sequence, tokens, now)

    def end(self, sequence: Sequence) -> None:
        key = sequence.adapter
        if sequence.started is not None:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
        self._note_idle(key)

    def block(self, key: AdapterKey) -> None:
        super().block(key)
        self._fetched.add(key)

    def first(self, now: float) -> Sequence | None:
        self._update(now)
        ready = [key for key in self._ready if key in self._active]
        if not ready:
            return None
        fresh = [key for key in ready if now - self._active[key] < self._slice_seconds]
        return self._waiting[min(fresh or ready, key=self._oldest)][0]

    def overdue(self, now: float) -> AdapterKey | None:
        """An active adapter takes the room of those that are not."""
        blocked = [key for key in self._blocked if key in self._active and key in self._waiting]
        if len(self._admitted) < self._active_adapters or not blocked:
            return None
        return min(blocked, key=self._oldest)

    def turn(self, key: AdapterKey) -> Turn:
        if key in self._active:
            return (0.0, self._oldest(key), 0.0, 0.0)
        return (1.0, self._line.get(key, math.inf), self._oldest(key), 0.0)

    def yields(self, key: AdapterKey, other: AdapterKey, now: float) -> bool:
        return key not in self._active and other in self._active

    def _update(self, now: float) -> None:
        for key in list(self._idle)[: len(self._line)]:
            del self._active[key]
            del self._idle[key]
        longest = next(iter(self._active), None)
        if (
            self._line
            and longest in self._active
            and longest not in self._running
            and now - self._active[longest] > self._slice_seconds
        ):
            del self._active[longest]
            self._idle.pop(longest, None)
            self._stand_in_line(longest)
        while self._line and len(self._active) < self._active_adapters:
            key = next(iter(self._line))
            if key not in self._fetched:
                break
            del self._line[key]
            if key in self._waiting:
                self._active[key] = now

    def _stand_in_line(self, key: AdapterKey | None) -> None:
        self._places += 1
        self._line[key] = self._places

    def _note_idle(self, key: AdapterKey | None) -> None:
        if key in self._active and key not in self._waiting and key not in self._running:
            self._idle[key] = None
