"""All processes of a running server, however they were started."""

import os

import psutil

from tests.end_to_end.server import Server


def processes_of(server: Server) -> list[psutil.Process]:
    """The supervisor, and all that it and they have started."""
    some = server.pids()["frontend"]
    for started in psutil.Process(os.getpid()).children():
        below = started.children(recursive=True)
        if some in {process.pid for process in below}:
            return [started, *below]
    raise AssertionError("the server does not run")
