"""One life of a process, from its start to its death, as it and others know it.

The keep-alive says in the environment which one it has started; a process that is started by hand
is the first of its kind. Numbers of later incarnations are greater, for all processes of a node:
they are moments of the clock that these share.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

VARIABLE = "LORADEX_INCARNATION"
BEATS = 8  # in the time after which silence means that the process hangs


class Incarnation:
    """Which process this is, and the signs of life that it gives.

    process     one of pipeline.channels.PROCESSES
    index       which of several
    number      greater than that of all that were started before
    restarts    how often its kind was started again before it
    descriptor  of a pipe that takes signs of life; None where nobody waits for them
    """

    def __init__(
        self,
        process: str,
        index: int = 0,
        *,
        number: int = 0,
        restarts: int = 0,
        descriptor: int | None = None,
        hang_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.process = process
        self.index = index
        self.number = number or time.monotonic_ns()
        self.restarts = restarts
        self.beat_seconds = math.inf if descriptor is None else hang_seconds / BEATS
        self._descriptor = descriptor
        self._clock = clock
        self._due = -math.inf

    @classmethod
    def of_environment(
        cls, process: str, *, hang_seconds: float, environment: Mapping[str, str] = os.environ
    ) -> "Incarnation":
        """What the keep-alive has said; the pipe is not passed on to processes of our own."""
        told = environment.get(VARIABLE)
        if told is None:
            return cls(process)
        index, number, restarts, descriptor = map(int, told.split())
        os.set_inheritable(descriptor, False)
        return cls(
            process,
            index,
            number=number,
            restarts=restarts,
            descriptor=descriptor,
            hang_seconds=hang_seconds,
        )

    def beat(self) -> None:
        """The loop goes on. Called in each of its turns, and never by another thread; the first
        call says that the process is ready. A loop that waits does so for `beat_seconds` at most.
        """
        if self._descriptor is None:
            return
        now = self._clock()
        if now < self._due:
            return
        self._due = now + self.beat_seconds
        with suppress(BlockingIOError, BrokenPipeError):  # the keep-alive stands still, or is gone
            os.write(self._descriptor, b".")


def told(index: int, number: int, restarts: int, descriptor: int) -> dict[str, str]:
    """What the keep-alive puts into the environment of the process that it starts."""
    return {VARIABLE: f"{index} {number} {restarts} {descriptor}"}
