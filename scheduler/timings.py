"""How long requests waited and how evenly their tokens came, counted by buckets. Pure."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Distribution:
    """Counts values by the buckets of a Prometheus histogram.

    bounds  upper ones, each inclusive, in rising order
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value; times is how often it occurred."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """(bound, how many values are not above it), the last bound being +Inf."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return zip(bounds, accumulate(self._counts), strict=True)


class Timings:
    """The distributions of one scheduler. Times are seconds."""

    def __init__(self) -> None:
        self.queue = Distribution(SECONDS)  # from a request's arrival to its first step
        self.first_token = Distribution(SECONDS)  # from its arrival to its first token
        self.between_tokens = Distribution(BETWEEN_TOKENS)  # of one request
        self.inference = Distribution(SECONDS)  # from its first step to its end
        self.step_rows = Distribution(ROWS)  # sequences in a step
