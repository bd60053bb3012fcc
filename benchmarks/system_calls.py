"""Do scheduler and GPU loop make a system call that can wait for a disk or a network?

    python -m benchmarks.system_calls [--json FILE]    (needs strace, and leave to trace)

The pipeline with a tiny model on the CPU. While adapters are loaded, one of which does not exist,
and requests run over them, strace records every call of all threads of the scheduler, and of the
thread of the GPU worker that runs the steps. A call counts as harmless if it touches no file
descriptor, or one that no disk and no network is behind: an eventfd, an epoll set, a Unix socket
(the I/O thread of ZeroMQ, which sets them non-blocking). Ends with 1 if there is any other.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import AdapterKind
from benchmarks.engine import Engine, Request
from benchmarks.harness import Scene, prepare, prompt
from benchmarks.machine import commit, machine
from pipeline.messages import AdapterKey

ADAPTERS, TOKENS, VOCABULARY = 12, 64, 512
TRACED = {"scheduler": ("-f",), "gpu_worker": ()}  # -f: all threads
# memory; waiting, for what others of the pipeline send or for a lock; questions to the kernel
WITHOUT_DESCRIPTOR = (
    *("brk", "madvise", "mmap", "mprotect", "munmap"),
    *("futex", "poll", "restart_syscall", "clock_nanosleep", "sched_yield", "eventfd2"),
    *("getpid", "getrusage", "gettid", "rt_sigprocmask", "rt_sigreturn"),
)
_CALL = re.compile(r"(?:\d+ +)?(?P<name>\w+)\((?P<first>[^,)]*)")
_HARMLESS = re.compile(r"\d+<(anon_inode:\[(eventfd|eventpoll)\]|UNIX(-STREAM)?:.*)>?")
_UNIX_SOCKET = re.compile(r"(?:\d+ +)?socket\(AF_UNIX, SOCK_STREAM\|SOCK_CLOEXEC")


def is_harmless(line: str) -> bool:
    """A line of strace -yy."""
    call = _CALL.match(line)
    if call is None:  # the second half of a call, a signal, the end of a thread
        return True
    if call["name"] in WITHOUT_DESCRIPTOR or _UNIX_SOCKET.match(line):
        return True
    return _HARMLESS.match(call["first"]) is not None


@contextmanager
def traced(pids: dict[str, int], folder: Path) -> Iterator[dict[str, Path]]:
    """Record the calls of these processes; their logs are complete afterwards."""
    tracers, logs = [], {name: folder / f"{name}.strace" for name in pids}
    try:
        for name, pid in pids.items():
            command = ["strace", "-yy", "-o", str(logs[name]), *TRACED[name], "-p", str(pid)]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            tracers.append(tracer)
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            if "attached" not in said:
                raise SystemExit(f"cannot trace: {said.strip()}")
        yield logs
    finally:
        for tracer in tracers:
            tracer.terminate()
            tracer.communicate()


def load_and_run(engine: Engine, names: list[str]) -> None:
    """Loads that go well, one that does not, and requests for all adapters at once."""
    generator = np.random.default_rng(0)
    for name in (*names, "missing"):
        engine.prefetch(AdapterKey("local", name))
    engine.run(Request(prompt(8, VOCABULARY, generator), TOKENS, name) for name in (None, *names))
    engine.metrics()  # each process reports at least once


def calls(log: Path) -> tuple[Counter[str], list[str]]:
    """How often each call was made, and the lines of those that are not harmless."""
    lines = log.read_text().splitlines()
    counted = Counter(match["name"] for line in lines if (match := _CALL.match(line)))
    return counted, [line for line in lines if not is_harmless(line)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [f"adapter-{number}" for number in range(ADAPTERS)]
    settings = {"arena_bytes": 16 << 20, "adapter_pool_bytes": 8 << 20}
    found: dict[str, Any] = {}
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loradex-bench-") as name:
        folder = Path(name)
        kinds = [(adapter, AdapterKind(rank=4)) for adapter in names]
        ready, _ = prepare(Scene("tiny", kinds, settings), folder)
        with Engine(ready, folder / "logs") as engine:
            pids = {process: engine.pid(process) for process in TRACED}
            with traced(pids, folder) as logs:
                load_and_run(engine, names)
            for process, log in logs.items():
                counted, strange = calls(log)
                found[process] = {"calls": dict(counted.most_common()), "others": strange}
                bad += strange
                print(process, dict(counted.most_common()), *strange, sep="\n    ")
    if options.json:
        command = " ".join(["python -m benchmarks.system_calls", *sys.argv[1:]])
        head = {"machine": machine(), "commit": commit(), "command": command}
        options.json.write_text(json.dumps({**head, **found}, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
