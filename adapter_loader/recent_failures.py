"""Which adapters have failed a short time ago: pure."""

from collections import OrderedDict

from pipeline.messages import AdapterKey, Failure

MAX_REMEMBERED = 4096


class RecentFailures:
    """seconds is how long each is remembered; `now` is in seconds of any clock that only grows."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures: OrderedDict[AdapterKey, tuple[float, Failure]] = OrderedDict()

    def add(self, key: AdapterKey, reason: Failure, now: float) -> None:
        """Remember this one from now on; those of long ago, and the oldest of too many, go."""
        self._failures.pop(key, None)
        self._failures[key] = (now + self._seconds, reason)
        while self._failures:
            oldest = next(iter(self._failures))
            if self._failures[oldest][0] > now and len(self._failures) <= MAX_REMEMBERED:
                return
            del self._failures[oldest]

    def forget(self, key: AdapterKey) -> None:
        self._failures.pop(key, None)

    def find(self, key: AdapterKey, now: float) -> Failure | None:
        until, reason = self._failures.get(key, (now, None))
        return reason if now < until else None
