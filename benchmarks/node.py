"""A whole tiny server as a user starts it, for benchmarks of how it bears load: and its figures."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.adapters import AdapterKind, write_adapters
from benchmarks.models import make_model, make_tokenizer
from benchmarks.pipeline import free_port
from pipeline.config import PREFIX
from pipeline.model_config import read_model_config

PROCESSES = ("frontend", "tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader")
START_SECONDS = 120
END_SECONDS = 60
KIND = AdapterKind(rank=8)
# What is 0 when nobody is served: all tiers that a request takes something of.
IDLE = (
    "loradex_requests_in_flight",
    "loradex_tokenizer_open_requests",
    "loradex_requests_running",
    "loradex_requests_waiting",
    "loradex_kv_blocks_used",
)


def write_scene(folder: Path, adapters: Sequence[str]) -> dict[str, Any]:
    """A tiny model, its tokenizer and adapters; gives the settings that name them."""
    model = make_model("tiny", folder)
    make_tokenizer(model)
    root = folder / "adapters"
    root.mkdir()
    write_adapters(root, read_model_config(model), [(name, KIND) for name in adapters])
    return {
        "model_folder": model,
        "adapter_root": root,
        "load_format": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "arena_bytes": 64 << 20,
        "gpu_threads": 1,
        "stats_seconds": 0.2,
    }


class Node:
    """`loradex serve` and all that it starts."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.port = free_port()
        self._run = folder / "run"
        given = {"port": self.port, "run_dir": self._run, **settings}
        named = {PREFIX + name.upper(): str(value) for name, value in given.items()}
        self.lines: list[str] = []
        self._ready = threading.Event()
        others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.launch", "serve"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**others, **named, "LORADEX_CONFIG": os.devnull},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(START_SECONDS)
        if not any("loradex is ready" in line for line in self.lines):
            self.kill()
            raise SystemExit("the server did not start:\n" + "\n".join(self.lines[-20:]))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if "loradex is ready" in line:
                self._ready.set()
        self._ready.set()  # ended

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> list[str]:
        """Wait for its end; gives what was not as it should be."""
        self._process.wait(END_SECONDS)
        self._reader.join(10)
        codes = dict(re.findall(r"(\w+)\.1 stopped \(rc=(-?\d+)\)", "\n".join(self.lines)))
        wrong = [f"{name} ended with {code}" for name, code in codes.items() if code != "0"]
        if set(codes) != set(PROCESSES):
            wrong.append(f"of the processes only {sorted(codes)} were seen to end")
        wrong += [f"{path.name} was left" for path in self._run.glob("*")]
        return wrong

    def kill(self) -> None:
        for pid in (self._process.pid, *descendants(self._process.pid)):
            kill_if_there(pid)
        self._process.wait()
        shutil.rmtree(self._run, ignore_errors=True)

    def pids(self) -> dict[str, list[int]]:
        """By process, all that run as it: the one that its keep-alive has started, then its own."""
        found: dict[str, list[int]] = {name: [] for name in PROCESSES}
        for pid in descendants(self._process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            for name in PROCESSES:
                if (b"-m", name.encode()) in pairwise(words):
                    found[name].append(pid)
        return found

    def memory(self) -> dict[str, int]:
        """Anonymous memory by process, bytes: without what is shared or a file's."""
        return {name: sum(map(anonymous, pids)) for name, pids in self.pids().items()}

    def files(self) -> dict[str, int]:
        """Open file descriptors by process."""
        return {name: sum(map(open_files, pids)) for name, pids in self.pids().items()}

    def metrics(self) -> dict[str, float]:
        """The sum over all samples of each name."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return totals(reply.read().decode())


def totals(text: str) -> dict[str, float]:
    """The sum over all samples of each name of a page of metrics."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name = re.split(r"[ {]", line, maxsplit=1)[0]
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def kill_if_there(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, level = list[int](), [pid]
    while level:
        level = [child for one in level for child in parents.get(one, [])]
        found += level
    return found


def anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s*(\d+)", text)
    return int(found[1]) << 10 if found else 0


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def words(number: int, count: int) -> str:
    """A prompt of so many tokens, another for each number."""
    return " ".join(f"w{3 + (number * 7 + at * 13) % 500}" for at in range(count))


def encode(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()
