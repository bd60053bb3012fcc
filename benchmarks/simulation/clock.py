"""The simulated clock: what happens next, and when."""

import heapq
from collections.abc import Callable

Event = Callable[[], None]


class Clock:
    """Events in the order of their times; of equal times, as they were told."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self._events: list[tuple[float, int, Event]] = []
        self._told = 0

    def at(self, time: float, event: Event) -> None:
        self._told += 1
        heapq.heappush(self._events, (time, self._told, event))

    def advance(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._events:
            return False
        self.now, _, event = heapq.heappop(self._events)
        event()
        return True
