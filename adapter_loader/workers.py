"""Threads that take jobs from a queue, and leave the processor to others."""

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

Job = Callable[[], None]
NICE = 10  # a tenth of the weight of an ordinary thread


class Workers:
    """A fixed number of threads. A job that raises would end its thread, so it must not.

    The threads are daemons: the process may end in the middle of a download. Jobs that run native
    code must not be cut off like that; `close` waits for those that have begun.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Drop the jobs that have not begun, and wait for the others."""
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        give_way()
        while (job := self._jobs.get()) is not None:
            job()


def give_way() -> None:
    """Beside a thread that makes tokens, this one gets a tenth of a core from now on.

    And it does not interrupt it (SCHED_BATCH). SCHED_IDLE would be politer still, but where all
    cores are busy no load would come to its end.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # 0: this thread
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
