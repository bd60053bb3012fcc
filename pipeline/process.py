"""What every process does around its loop: settings, logs, signals, its incarnation, its end.

A process runs until a Shutdown message has come to it from all that feed it. SIGTERM only sets a
deadline, after which it exits whatever it is doing; the frontend, where Shutdown starts, also
drains on it.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from prometheus_client import Counter

from pipeline.config import Settings, load_settings
from pipeline.errors import ConfigError
from pipeline.incarnation import Incarnation
from pipeline.logs import set_up_logs
from pipeline.metrics import REGISTRY

EXIT_CONFIG = 2
EXIT_DEADLINE = 3
GRACE_SECONDS = 5.0  # for what is downstream of the frontend, after its drain

RESTARTS = Counter(
    "loradex_process_restarts",
    "Starts of this process after the first, each of which a death came before",
    registry=REGISTRY,
)
log = logging.getLogger(__name__)


def run(process: str, main: Callable[[Settings, Incarnation], None]) -> None:
    """Be `process`: load the settings, then run main(settings, incarnation) to its end and exit.

    Which of several it is, the keep-alive says that starts them.
    """
    try:
        settings = load_settings()
        set_up_logs(process, settings.log_level, settings.log_format)
        run_folder(settings)
        incarnation = Incarnation.of_environment(process, hang_seconds=settings.hang_seconds)
        name = f"{process}.{incarnation.index}" if count(process, settings) > 1 else process
        set_up_logs(name, settings.log_level, settings.log_format)
        RESTARTS.inc(incarnation.restarts)
        _set_deadline_on_sigterm(settings.drain_seconds + GRACE_SECONDS)
        main(settings, incarnation)
        log.info("event=stopped")
    except ConfigError as error:
        print(f"loradex: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)


def count(process: str, settings: Settings) -> int:
    """How many of a process run."""
    counts = {"frontend": settings.frontends, "tokenizer_workers": settings.tokenizer_workers}
    return counts.get(process, 1)


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
