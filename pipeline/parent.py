"""The tie between a process and the one that has started it."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl  # here, since nothing may be loaded between fork and exec


def die_with_parent() -> None:
    """From now on this process is killed when the thread that has forked it ends. Whoever may be
    too late for that looks at os.getppid() afterwards."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
