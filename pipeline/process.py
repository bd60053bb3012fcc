"""What every process does around its loop: settings, logs, signals, numbering, its end.

A process runs until a Shutdown message has come to it from all that feed it. SIGTERM only sets a
deadline, after which it exits whatever it is doing; the frontend, where Shutdown starts, also
drains on it.
"""

import ctypes
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pipeline.config import Settings, load_settings
from pipeline.errors import ConfigError
from pipeline.logs import set_up_logs
from pipeline.privacy import PRIVATE, keep_private

EXIT_CONFIG = 2
EXIT_DEADLINE = 3
GRACE_SECONDS = 5.0  # for what is downstream of the frontend, after its drain
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


def run(
    process: str,
    main: Callable[[Settings, int], None],
    count: int | Callable[[Settings], int] = 1,
) -> None:
    """Be `process`: load the settings, then run main(settings, index) to its end and exit.

    With a count above one, the others are forked first, before threads or sockets exist; index 0
    is the one that was started, and ends with an error when another does. A count that is a
    setting is given as the function that reads it.
    """
    keep_private()
    try:
        settings = load_settings()
        set_up_logs(process, settings.log_level, settings.log_format)
        run_folder(settings)
        processes = count(settings) if callable(count) else count
        index, children = _fork(processes)
        name = f"{process}.{index}" if processes > 1 else process
        set_up_logs(name, settings.log_level, settings.log_format)
        _set_deadline_on_sigterm(settings.drain_seconds + GRACE_SECONDS)
        main(settings, index)
        log.info("event=stopped")
    except ConfigError as error:
        print(f"loradex: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)
    sys.exit(children.wait())


def run_folder(settings: Settings) -> Path:
    """Make the folder for the sockets, readable by its owner alone. Raises ConfigError."""
    folder = settings.run_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()  # a link may be somebody else's
    except OSError as error:
        raise ConfigError(f"run_dir: cannot use {folder}: {error.strerror}") from error
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not ours or status.st_mode & PRIVATE:
        raise ConfigError(f"run_dir: {folder} is not a folder of this user alone (mode 0700)")
    if len(os.fsencode(folder)) > 80:
        raise ConfigError(f"run_dir: {folder} is too long a path for sockets (80 bytes at most)")
    return folder


def _set_deadline_on_sigterm(seconds: float) -> None:
    def expired(_signal: int, _frame: FrameType | None) -> None:
        log.error("event=deadline_passed")
        os._exit(EXIT_DEADLINE)

    def asked_to_stop(_signal: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    signal.signal(signal.SIGALRM, expired)
    signal.signal(signal.SIGTERM, asked_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody


def _fork(count: int) -> tuple[int, "_Children"]:
    parent = os.getpid()
    pids = []
    for index in range(1, count):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            return index, _Children([])
        pids.append(pid)
    return 0, _Children(pids)


class _Children:
    """The other processes of the first: when one fails, the first ends at once with an error.

    A thread waits for each. A handler of SIGCHLD would miss a child that ends before it is set,
    or between the interpreter's last look at its signals and a wait without a limit.
    """

    def __init__(self, pids: list[int]) -> None:
        self._draining = False
        self._failed = 0
        self._waiting = [
            threading.Thread(target=self._watch, args=(pid,), daemon=True) for pid in pids
        ]
        for thread in self._waiting:
            thread.start()

    def wait(self) -> int:
        """Wait until all have ended, each in its own time; returns 1 if one failed, else 0."""
        self._draining = True
        for thread in self._waiting:
            thread.join()
        return self._failed

    def _watch(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        if status == 0:
            return
        log.error("event=child_died pid=%d status=%d", pid, status)
        self._failed = 1
        if not self._draining:
            os._exit(1)
