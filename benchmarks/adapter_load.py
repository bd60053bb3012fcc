"""How fast the loader brings adapters from the page cache into the arena.

    python -m benchmarks.adapter_load [--processes 1 2 4] [--rounds 3] [--adapters 32] [--rank 16]
        [--json FILE]

The real adapter_loader, for Llama-3.1-8B in bf16 (84 MB per adapter of rank 16), with this script
as its scheduler: it asks for all adapters at once and gives each extent back when it is staged.
The arena holds half of them, so that every load is cold; their files lie in the page cache. The
first round is the first use of the arena's pages.

GB/s is of packed bytes, by the clock; GB/s per core is by the processor time of the loader and its
packing processes. Stages are seconds per adapter, by the clock of the thread that has it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from benchmarks.adapters import AdapterKind
from benchmarks.engine import Metrics, start_process
from benchmarks.harness import ADAPTERS, Scene, prepare
from benchmarks.machine import commit, machine
from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    ArenaReady,
    LoadAdapter,
    ReleaseAdapter,
    Shutdown,
    Stats,
    ToFrontend,
    ToScheduler,
)
from pipeline.model_config import read_model_config
from pipeline.process import run_folder

MODEL = "llama-3.1-8b"
PROCESS = "adapter_loader"
STAGES = ("fetch", "check", "pack")
DISTINCT = 16  # weight files that are written; the other adapters are links to them
WAIT_MS = 60_000


class Round(NamedTuple):
    """What loading all adapters once took, in seconds."""

    clock: float
    processor: float
    nbytes: int


class Loader:
    """The process, seen as the scheduler and a frontend see it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        run_dir = run_folder(settings)
        self._scheduler = Inbox[ToScheduler](run_dir, "scheduler", 0, ToScheduler)
        self._frontend = Inbox[ToFrontend](run_dir, "frontend", 0, ToFrontend)
        self._outbox = Outbox(run_dir)
        self._peers = [Outbox(run_dir, Incarnation(peer)) for peer in ("scheduler", "frontend")]
        for peer in self._peers:  # who is not known, is told nothing
            peer.greet(PROCESS)
        self._log = folder / "loader.log"
        self._process = start_process(PROCESS, settings, self._log)
        while not any(isinstance(message, ArenaReady) for message in self._receive()):
            pass

    def load(self, names: list[str]) -> Round:
        """Ask for all of them at once. Raises SystemExit if one cannot be had."""
        processor, start, nbytes = self._processor_seconds(), time.monotonic(), 0
        for name in names:
            self._outbox.send(PROCESS, LoadAdapter(AdapterKey("local", name)))
        left = len(names)
        while left:
            for message in self._receive():
                if isinstance(message, AdapterFailed):
                    raise SystemExit(message.failure.message)
                if isinstance(message, AdapterDropped):  # another's place was needed
                    continue
                assert isinstance(message, AdapterStaged)
                release = ReleaseAdapter(message.adapter, message.arena_offset)
                self._outbox.send(PROCESS, release)
                left, nbytes = left - 1, nbytes + message.nbytes
        return Round(time.monotonic() - start, self._processor_seconds() - processor, nbytes)

    def metrics(self) -> Metrics:
        """The second report from now on was surely written after now."""
        reports = 0
        self._frontend.receive(0)
        while True:
            for message in self._frontend.receive(WAIT_MS):
                reports += isinstance(message, Stats)
                if isinstance(message, Stats) and reports > 1:
                    return Metrics({PROCESS: message.families})

    def close(self) -> None:
        self._outbox.send(PROCESS, Shutdown("scheduler"))
        self._process.wait()
        for outbox in (self._outbox, *self._peers):
            outbox.close(0)
        self._scheduler.close()
        self._frontend.close()

    def _receive(self) -> list[Any]:
        messages = self._scheduler.receive(WAIT_MS)
        if not messages:
            self._process.kill()
            raise SystemExit(f"the loader says nothing\n{self._log.read_text()}")
        return messages

    def _processor_seconds(self) -> float:
        loader = psutil.Process(self._process.pid)
        spent = [one.cpu_times() for one in (loader, *loader.children(recursive=True))]
        return sum(times.user + times.system for times in spent)


@contextmanager
def loading(settings: Settings, folder: Path) -> Iterator[Loader]:
    loader = Loader(settings, folder)
    try:
        yield loader
    finally:
        loader.close()


def warm(root: Path) -> None:
    """Bring every weight file into the page cache."""
    for path in root.rglob("*.safetensors"):
        path.read_bytes()


def measure(
    loader: Loader, names: list[str], processes: int, rounds: int
) -> Iterator[dict[str, Any]]:
    for number in range(rounds):
        before = loader.metrics()
        done = loader.load(names)
        after = loader.metrics()
        yield {
            "processes": processes,
            "round": number,
            "gb_per_s": done.nbytes / done.clock / 1e9,
            "gb_per_s_per_core": done.nbytes / done.processor / 1e9,
            "adapters_per_s": len(names) / done.clock,
            **{f"{stage}_s": spent(before, after, stage) / len(names) for stage in STAGES},
        }


def spent(before: Metrics, after: Metrics, stage: str) -> float:
    """Seconds, summed over the adapters."""
    name = "loradex_adapter_load_stage_seconds_sum"
    return after.since(before, PROCESS, name, stage=stage) or 0.0


def show(row: dict[str, Any]) -> None:
    stages = "  ".join(f"{stage} {1e3 * row[f'{stage}_s']:6.1f} ms" for stage in STAGES)
    print(
        f"{row['processes']:3} processes, round {row['round']}: {row['gb_per_s']:6.2f} GB/s, "
        f"{row['gb_per_s_per_core']:6.2f} per core, {row['adapters_per_s']:6.1f} adapters/s  "
        f"{stages}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [f"adapter-{number}" for number in range(options.adapters)]
    kind = AdapterKind(rank=options.rank)
    scene = Scene(
        model=MODEL,
        kinds=[(name, kind) for name in names],
        settings={"stats_seconds": 0.1},
        distinct=min(DISTINCT, options.adapters),
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="loradex-bench-") as name:
        settings, _ = prepare(scene, Path(name))
        nbytes = kind.nbytes(read_model_config(Path(settings.model_folder)))
        warm(Path(name) / ADAPTERS)
        print(f"{machine()}, commit {commit()}; {options.adapters} adapters of {nbytes} bytes")
        for processes in options.processes:
            changed = msgspec.structs.replace(
                settings,
                packing_processes=processes,
                arena_bytes=nbytes * options.adapters // 2,
            )
            with loading(changed, Path(name)) as loader:
                for row in measure(loader, names, processes, options.rounds):
                    show(row)
                    rows.append(row)
    if options.json:
        command = " ".join(["python -m benchmarks.adapter_load", *sys.argv[1:]])
        head = {"machine": machine(), "commit": commit(), "command": command}
        options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
