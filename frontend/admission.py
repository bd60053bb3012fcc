"""Who may come in: a bounded number of requests, and none once the server drains. Pure."""

from pipeline.errors import RequestError
from pipeline.messages import FailureKind


class Admission:
    """The places of one frontend, and how many of them each tokenizer worker has to serve.

    places   requests that are in flight at once
    workers  tokenizer workers to share them out to
    """

    def __init__(self, *, places: int, workers: int) -> None:
        self._places = places
        self._in_flight_of = [0] * workers
        self._away: set[int] = set()  # workers that have died and are not back
        self._draining = False

    @property
    def in_flight(self) -> int:
        return sum(self._in_flight_of)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Let nobody in from now on."""
        self._draining = True

    def check_open(self) -> None:
        """Raises RequestError when it drains: there is no use in reading what is asked for."""
        if self._draining:
            raise RequestError(503, FailureKind.SHUTDOWN, "The server is shutting down")

    def enter(self) -> int:
        """Take a place; gives the tokenizer worker with the least to do, of those that live if any
        do. Raises RequestError."""
        self.check_open()
        if self.in_flight >= self._places:
            raise RequestError(
                429,
                FailureKind.OVERLOADED,
                f"The server has {self._places} requests in flight and takes no more",
            )
        workers = range(len(self._in_flight_of))
        worker = min(workers, key=lambda one: (one in self._away, self._in_flight_of[one]))
        self._in_flight_of[worker] += 1
        return worker

    def worker_died(self, worker: int) -> None:
        """Who is given to it waits until it is back."""
        self._away.add(worker)

    def worker_started(self, worker: int) -> None:
        self._away.discard(worker)

    def leave(self, worker: int) -> None:
        """Give back the place that enter gave."""
        if not self._in_flight_of[worker]:
            raise ValueError(f"nobody is in flight at tokenizer worker {worker}")
        self._in_flight_of[worker] -= 1
