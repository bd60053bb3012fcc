"""When to try again: exponential back-off with full jitter, within tries and time.

The delays are those of Marc Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog,
2015): uniform between nothing and a bound that doubles, so that clients who failed together do
not come back together.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from adapter_loader.refusals import unavailable

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 8.0

T = TypeVar("T")


class Interrupted(Exception):
    """What went wrong may go well when it is tried again.

    reason   the end of a sentence for the client
    seconds  how long the other side wants to be left alone, at least
    """

    def __init__(self, reason: str, seconds: float = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.seconds = seconds


class Retries:
    """How often and how long one thing is tried.

    tries    the first one included
    seconds  from the first try; no wait goes beyond it
    """

    def __init__(
        self,
        *,
        tries: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._tries = tries
        self._seconds = seconds
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform

    def deadline(self) -> float:
        """When what starts now must be over, on time.monotonic()."""
        return self._clock() + self._seconds

    def run(self, job: Callable[[], T], deadline: float) -> T:
        """The first result. Raises RequestError: the job's, or `unavailable` after the last try."""
        bound = FIRST_SECONDS
        for left in reversed(range(self._tries)):
            try:
                return job()
            except Interrupted as error:
                wait = max(self._uniform(0, bound), error.seconds)
                if not left or self._clock() + wait >= deadline:
                    raise unavailable(error.reason) from error
            self._sleep(wait)
            bound = min(2 * bound, LONGEST_SECONDS)
        raise AssertionError("the last try returns or raises")
