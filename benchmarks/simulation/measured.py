"""What a policy does to tenants: who waits, who is served how much, and what is resident."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Numbers

from benchmarks.simulation.wrapped import Wrapped
from pipeline.messages import AdapterKey
from scheduler.fair_share import INPUT_COST, OUTPUT_COST
from scheduler.policy import Policy
from scheduler.sequence import Sequence

WINDOW_SECONDS = 5.0


def jain(numbers: Numbers[float]) -> float:
    """Jain's index of fairness: 1 if all have the same, 1/n if one has all."""
    squares = len(numbers) * sum(number * number for number in numbers)
    return sum(numbers) ** 2 / squares if squares else 1.0


class Measured(Wrapped):
    """Served tokens are weighted as the product's policy weighs them.

    indices  Jain's, of each window in which at least two tenants had requests waiting all the time,
             over what these were served in it
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.resident: set[AdapterKey] = set()
        self.indices: list[float] = []
        self.windows = 0
        self._waiting: Counter[str] = Counter()
        self._waits: set[Sequence] = set()
        self._waiting_since: dict[str, float] = {}
        self._served: dict[str, float] = {}
        self._window = 0.0  # its start
        self._now = 0.0

    def look(self, now: float) -> None:
        """To be called as time passes."""
        self._now = now
        if now < self._window + WINDOW_SECONDS:
            return
        waited = [name for name, since in self._waiting_since.items() if since <= self._window]
        self.windows += 1
        if len(waited) > 1:
            self.indices.append(jain([self._served.get(name, 0.0) for name in waited]))
        self._served.clear()
        self._window = now

    def join(self, sequence: Sequence) -> None:
        super().join(sequence)
        self._waits.add(sequence)
        if not self._waiting[sequence.tenant]:
            self._waiting_since[sequence.tenant] = self._now
        self._waiting[sequence.tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        super().leave(sequence)
        self._left(sequence)

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        super().start(sequence, tokens, now)
        self._left(sequence)
        self._serve(sequence.tenant, INPUT_COST * tokens)

    def produced(self, sequences: Iterable[Sequence]) -> None:
        super().produced(sequences)
        for tenant, count in Counter([one.tenant for one in sequences]).items():
            self._serve(tenant, OUTPUT_COST * count)

    def admit(self, key: AdapterKey) -> None:
        super().admit(key)
        self.resident.add(key)

    def shut(self, key: AdapterKey) -> None:
        super().shut(key)
        self.resident.discard(key)

    def _left(self, sequence: Sequence) -> None:
        if sequence not in self._waits:
            return
        self._waits.remove(sequence)
        self._waiting[sequence.tenant] -= 1
        if not self._waiting[sequence.tenant]:
            del self._waiting_since[sequence.tenant]

    def _serve(self, tenant: str, tokens: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens
