"""What every process does around its loop: settings, logs, signals, numbering, its end.

A process runs until a Shutdown message has come to it from all that feed it. SIGTERM only sets a
deadline, after which it exits whatever it is doing; the frontend, where Shutdown starts, also
drains on it.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pipeline.config import Settings, load_settings
from pipeline.errors import ConfigError
from pipeline.logs import set_up_logs

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
    try:
        settings = load_settings()
        set_up_logs(process, settings.log_level)
        run_folder(settings)
        processes = count(settings) if callable(count) else count
        index = _fork(processes)
        set_up_logs(f"{process}.{index}" if processes > 1 else process, settings.log_level)
        _set_deadline_on_sigterm(settings.drain_seconds + GRACE_SECONDS)
        main(settings, index)
        log.info("event=stopped")
    except ConfigError as error:
        print(f"loradex: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)
    if index == 0:
        sys.exit(_wait_for_children())
    sys.exit(0)


def run_folder(settings: Settings) -> Path:
    """Make the folder for the sockets, readable by its owner alone. Raises ConfigError."""
    folder = settings.run_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigError(f"run_dir: cannot use {folder}: {error.strerror}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
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


def _fork(count: int) -> int:
    parent = os.getpid()
    for index in range(1, count):
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            return index
    if count > 1:
        signal.signal(signal.SIGCHLD, _child_ended)
    return 0


def _child_ended(_signal: int, _frame: FrameType | None) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if status != 0:
            log.error("event=child_died pid=%d status=%d", pid, status)
            os._exit(1)


def _wait_for_children() -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    failed = 0
    while True:
        try:
            _, status = os.wait()
        except ChildProcessError:
            return failed
        failed = failed or int(status != 0)
