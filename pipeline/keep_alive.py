"""`python -m pipeline.keep_alive PROCESS`: starts a process, and starts it again when it has died.

In front of each line of the procfile; of the tokenizer workers and the frontends, of which several
may run, each is started for itself. A process dies when it exits with an error, is killed, or
hangs: once it has given its first sign of life, silence for `hang_seconds` is answered with
SIGKILL. The first death is answered at once, those after it ever later, and more than
`restart_limit` within `restart_window_seconds` end the keep-alive, upon which honcho ends all.

So does an operator's error at the first start. After a start that went well the same error is a
death like others: the settings are the same, so it may pass, as a lack of memory does.

A process that ends well is not started again; the keep-alive ends with the last of its own, once
those of the other processes have ended too, or some seconds later. It
passes on SIGTERM and SIGINT, to those as well that it starts later. If it is killed, so are they.
"""

import argparse
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pipeline.arena import remove_arena
from pipeline.channels import PROCESSES, Outbox, remove_inbox
from pipeline.config import Settings, load_settings
from pipeline.errors import ConfigError
from pipeline.incarnation import told
from pipeline.logs import set_up_logs
from pipeline.messages import ProcessDied
from pipeline.parent import die_with_parent
from pipeline.process import EXIT_CONFIG, EXIT_DEADLINE, GRACE_SECONDS, count

LONGEST_BACKOFF_SECONDS = 30.0
LOOK_SECONDS = 1.0  # between two looks at the clock

log = logging.getLogger(__name__)


class Deaths:
    """How long to wait before the next start. Times are seconds of one clock.

    limit            deaths within window_seconds, after which it is given up
    backoff_seconds  before the second start within window_seconds; doubles with each
    """

    def __init__(self, *, limit: int, window_seconds: float, backoff_seconds: float) -> None:
        self._limit = limit
        self._window_seconds = window_seconds
        self._backoff_seconds = backoff_seconds
        self._moments: deque[float] = deque()

    def add(self, now: float) -> float | None:
        """One more; the seconds to wait, or None if there were too many."""
        while self._moments and self._moments[0] <= now - self._window_seconds:
            self._moments.popleft()
        self._moments.append(now)
        recent = len(self._moments)
        if recent > self._limit:
            return None
        if recent == 1:
            return 0.0
        return min(self._backoff_seconds * 2.0 ** (recent - 2), LONGEST_BACKOFF_SECONDS)


class Kept:
    """One process that is kept alive."""

    def __init__(
        self, process: str, command: Sequence[str], index: int, settings: Settings, outbox: Outbox
    ) -> None:
        self._process = process
        self._command = command
        self._outbox = outbox
        self._run_dir = settings.run_folder()
        self._frontends = settings.frontends
        self._number = 0  # of the incarnation
        self._index = index
        self._hang_seconds = settings.hang_seconds
        self._deaths = Deaths(
            limit=settings.restart_limit,
            window_seconds=settings.restart_window_seconds,
            backoff_seconds=settings.restart_backoff_seconds,
        )
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe = -1  # the end of it that is read
        self._starts = 0
        self._due = 0.0  # when to start it, while there is none
        self._heard: float | None = None  # when it gave its latest sign of life
        self._was_ready = False  # this incarnation, or one before
        self._hangs = False
        self._asked_to_stop = 0  # the signal, or 0
        self._knows = False  # this incarnation has been sent it
        self.ended: int | None = None  # the status to end with, once it is not started again

    def next_deadline(self) -> float:
        if self._child is None:
            return self._due
        if self._heard is None or self._hangs:
            return math.inf
        return self._heard + self._hang_seconds

    def start_if_due(self, now: float) -> None:
        if self._child is not None or self.ended is not None or now < self._due:
            return
        ours, its = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._number = time.monotonic_ns()
        environment = told(self._index, self._number, self._starts, its)
        parent = os.getpid()

        def dies_with_us() -> None:
            die_with_parent()
            if os.getppid() != parent:
                os._exit(1)

        self._child = subprocess.Popen(
            self._command,
            env=os.environ | environment,
            pass_fds=(its,),
            process_group=0,  # so that a signal to the group reaches it through us alone
            preexec_fn=dies_with_us,  # there is no other thread of Python here
        )
        os.close(its)
        self._pipe = ours
        self._starts += 1
        self._heard, self._hangs, self._knows = None, False, False
        log.info("event=started index=%d pid=%d", self._index, self._child.pid)

    def stop(self, number: int) -> None:
        """Pass a signal on, to incarnations to come as well: what runs goes on until it ends."""
        self._asked_to_stop = number
        if self._child is not None:
            self._knows = True
            self._child.send_signal(number)

    def listen(self, now: float) -> None:
        """Take the signs of life that have come."""
        if self._child is None:
            return
        try:
            beats = os.read(self._pipe, 4096)
        except BlockingIOError:
            return
        if not beats:
            return
        if self._heard is None:
            self._was_ready = True
            if self._asked_to_stop and not self._knows:
                self.stop(self._asked_to_stop)
        self._heard = now

    def kill_if_hanging(self, now: float) -> None:
        if self._child is None or self._heard is None or self._hangs:
            return
        if now - self._heard >= self._hang_seconds:
            self._hangs = True
            self._child.kill()

    def excuse(self, seconds: float) -> None:
        """Nobody has listened for so long."""
        if self._heard is not None:
            self._heard += seconds

    def reap(self, now: float) -> None:
        """See whether it has ended, and what follows from that."""
        if self._child is None or (status := self._child.poll()) is None:
            return
        pid, self._child = self._child.pid, None
        os.close(self._pipe)
        remove_inbox(self._run_dir, self._process, self._index)
        if status == 0 or status == EXIT_DEADLINE or self._is_stopped_by(status):
            self.ended = max(status, 0)
            return
        if status == EXIT_CONFIG and not self._was_ready:
            self.ended = status
            return
        cause = f"no sign of life for {self._hang_seconds:g} s" if self._hangs else _cause(status)
        wait = self._deaths.add(now)
        if wait is None:
            log.error("event=died index=%d pid=%d cause=%a given_up=true", self._index, pid, cause)
            self.ended = status if status > 0 else 1
            return
        log.error(
            "event=died index=%d pid=%d cause=%a starts_again_in=%g", self._index, pid, cause, wait
        )
        for frontend in range(self._frontends):
            died = ProcessDied(self._process, self._index, self._number, cause)
            self._outbox.send("frontend", died, frontend)
        self._due = now + wait

    def _is_stopped_by(self, status: int) -> bool:
        """It was asked to stop before it could listen to that, or when it had stopped already and
        the interpreter listened no longer."""
        return bool(self._asked_to_stop) and status == -self._asked_to_stop

    @property
    def pipe(self) -> int | None:
        return None if self._child is None else self._pipe


def keep_alive(process: str, command: Sequence[str], settings: Settings) -> int:
    """Until all have ended; returns the status to exit with."""
    outbox = Outbox(settings.run_folder())
    indices = range(count(process, settings))
    kept = [Kept(process, command, index, settings, outbox) for index in indices]
    wakes = _Signals(kept)
    while True:
        before = time.monotonic()
        for one in kept:
            one.start_if_due(before)
        failed = next((one.ended for one in kept if one.ended), 0)
        if failed or all(one.ended is not None for one in kept):
            outbox.close(linger_ms=0)
            if not failed:
                _wait_for_others(settings.run_folder())
            return failed
        deadline = min(one.next_deadline() for one in kept if one.ended is None)
        timeout = min(max(0.0, deadline - before), LOOK_SECONDS)
        pipes = [one.pipe for one in kept if one.pipe is not None]
        select.select([wakes.descriptor, *pipes], [], [], timeout)
        now = time.monotonic()
        wakes.take()
        for one in kept:
            one.excuse(max(0.0, now - before - 2 * LOOK_SECONDS))  # we have been stopped ourselves
            one.listen(now)
            one.kill_if_hanging(now)
            one.reap(now)


def _wait_for_others(run_dir: Path) -> None:
    """Until their inboxes are gone, too: honcho kills those that end long after the first."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(run_dir.glob("*.sock")) and time.monotonic() < deadline:
        time.sleep(0.02)


class _Signals:
    """SIGTERM and SIGINT, which are passed on, and SIGCHLD; each makes `descriptor` readable."""

    def __init__(self, kept: Sequence[Kept]) -> None:
        self.descriptor, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

        def stop(number: int, _frame: FrameType | None) -> None:
            for one in kept:
                one.stop(number)

        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def take(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.descriptor, 4096)


def _cause(status: int) -> str:
    if status >= 0:
        return f"exit {status}"
    return f"signal {-status} ({signal.strsignal(-status)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("process", choices=PROCESSES)
    process = parser.parse_args().process
    try:
        settings = load_settings()
    except ConfigError as error:
        print(f"loradex: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)
    set_up_logs(process, settings.log_level, settings.log_format)
    status = keep_alive(process, [sys.executable, "-m", process], settings)
    if process == "adapter_loader":  # one that dies leaves the arena to its successor
        remove_arena(settings.run_folder())
    sys.exit(status)


if __name__ == "__main__":
    main()
