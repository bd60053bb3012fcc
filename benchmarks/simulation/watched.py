"""A policy that notes for how long the adapters that wait for room are passed."""

from benchmarks.simulation.wrapped import Wrapped
from pipeline.messages import AdapterKey
from scheduler.policy import Policy, Turn
from scheduler.sequence import Sequence


class Watched(Wrapped):
    """For adapters that one tenant each uses: another tenant's queue has a turn of its own.

    longest  seconds from when somebody with an adapter was first started out of turn before one
             that is waited for and lacks nothing but room, to when that happened last
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._blocked: dict[AdapterKey, float | None] = {}  # when it was first passed
        self._waiting: dict[AdapterKey, int] = {}
        self._waits: set[Sequence] = set()
        self.longest = 0.0

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        key = sequence.adapter
        if key is not None and sequence.started is None:
            self._note_passed(self.policy.turn(key), now)
        self.policy.start(sequence, tokens, now)
        self._left(sequence)

    def _note_passed(self, turn: Turn, now: float) -> None:
        for blocked, since in self._blocked.items():
            if not self._waiting.get(blocked) or turn <= self.policy.turn(blocked):
                continue
            if since is None:
                self._blocked[blocked] = since = now
            self.longest = max(self.longest, now - since)

    def join(self, sequence: Sequence) -> None:
        self.policy.join(sequence)
        if sequence.adapter is not None:
            self._waits.add(sequence)
            self._waiting[sequence.adapter] = self._waiting.get(sequence.adapter, 0) + 1

    def leave(self, sequence: Sequence) -> None:
        self.policy.leave(sequence)
        self._left(sequence)

    def _left(self, sequence: Sequence) -> None:
        key = sequence.adapter
        if key is None or sequence not in self._waits:
            return
        self._waits.remove(sequence)
        self._waiting[key] -= 1
        if not self._waiting[key] and self._blocked.get(key) is not None:
            self._blocked[key] = None

    def block(self, key: AdapterKey) -> None:
        self.policy.block(key)
        self._blocked[key] = None

    def unblock(self, key: AdapterKey) -> None:
        self.policy.unblock(key)
        self._blocked.pop(key, None)
