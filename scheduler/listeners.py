"""Which tokenizer worker hears of a request, and what has ended and may not have been heard: pure.

When a tokenizer worker was started again the requests of its predecessors go on, but nobody is told
of them until they have been submitted again; all that they have produced is said then. What has
ended is kept for the same reason, until its frontend has its end.
"""

from collections.abc import Iterable

from pipeline.messages import REQUEST_BITS, Finished, Resumed, Tokens
from scheduler.reply import Reply
from scheduler.sequence import Sequence

NOBODY = -1  # in place of a worker
Ended = tuple[Sequence, Finished]
MAX_ENDED = 1 << 14  # kept at once; frontends that live hear of an end before they admit as many


class Listeners:
    """The tokenizer workers.

    replies  what each is to be told next; the last is what nobody is told
    """

    def __init__(self, workers: int) -> None:
        self.replies = [Reply() for _ in range(workers + 1)]
        self._ended: dict[int, Ended] = {}  # by request; those that ended first come first
        self._orphans: dict[int, int] = {}  # requests of predecessors, and of which worker

    @property
    def kept(self) -> int:
        """How many have ended and are not known to have been heard."""
        return len(self._ended)

    def started(self, worker: int, running: Iterable[Sequence]) -> None:
        """A worker was started again: nobody hears of what its predecessors had among the
        `running`, and among what is kept."""
        for sequence in (*running, *(sequence for sequence, _ in self._ended.values())):
            if sequence.worker == worker:
                sequence.worker = NOBODY
                self._orphans[sequence.request_id] = worker

    def resume(self, request_id: int, running: Sequence | None, worker: int) -> Resumed | None:
        """It was submitted again by this worker, which is to be told this before all else, if it
        is among what runs or what is kept."""
        sequence, finished = self._ended.get(request_id, (running, None))
        if sequence is None:
            return None
        self._orphans.pop(request_id, None)
        sequence.worker = worker
        return sequence.resumed(finished)

    def orphans(self, worker: int, frontend: int) -> list[int]:
        """Requests of a worker's predecessors that were not submitted again."""
        return [
            request_id
            for request_id, of in self._orphans.items()
            if of == worker and request_id >> REQUEST_BITS == frontend
        ]

    def keep(self, sequence: Sequence, finished: Finished) -> None:
        """It has ended; what it has said may have to be said again."""
        self._ended[sequence.request_id] = (sequence, finished)
        if len(self._ended) > MAX_ENDED:
            self.forget(next(iter(self._ended)))

    def kept_of(self, frontend: int) -> list[int]:
        return [one for one in self._ended if one >> REQUEST_BITS == frontend]

    def forget(self, request_id: int) -> None:
        """Nobody will ask for it again."""
        self._ended.pop(request_id, None)
        self._orphans.pop(request_id, None)

    def take(self) -> tuple[list[tuple[int, Tokens]], int]:
        """What is to be said, to which worker; and how many tokens there were in all."""
        said, tokens = [], 0
        for worker, reply in enumerate(self.replies):
            if reply.request_ids or reply.finished:
                tokens += len(reply.request_ids)
                message = reply.take()
                if reply is not self.replies[NOBODY]:
                    said.append((worker, message))
        return said, tokens
