"""A policy that does what another does, for those that look on."""

from collections.abc import Iterable

from pipeline.messages import AdapterKey
from scheduler.policy import Policy, Turn
from scheduler.sequence import Sequence


class Wrapped(Policy):
    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def join(self, sequence: Sequence) -> None:
        self.policy.join(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.policy.leave(sequence)

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        self.policy.start(sequence, tokens, now)

    def end(self, sequence: Sequence) -> None:
        self.policy.end(sequence)

    def produced(self, sequences: Iterable[Sequence]) -> None:
        self.policy.produced(sequences)

    def admit(self, key: AdapterKey) -> None:
        self.policy.admit(key)

    def shut(self, key: AdapterKey) -> None:
        self.policy.shut(key)

    def block(self, key: AdapterKey) -> None:
        self.policy.block(key)

    def unblock(self, key: AdapterKey) -> None:
        self.policy.unblock(key)

    def first(self, now: float) -> Sequence | None:
        return self.policy.first(now)

    def overdue(self, now: float) -> AdapterKey | None:
        return self.policy.overdue(now)

    def turn(self, key: AdapterKey) -> Turn:
        return self.policy.turn(key)

    def blocked_in_turn(self, most: int) -> list[AdapterKey]:
        return self.policy.blocked_in_turn(most)

    def yields(self, key: AdapterKey, other: AdapterKey, now: float) -> bool:
        return self.policy.yields(key, other, now)
