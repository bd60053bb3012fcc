"""How many tokens per second the pipeline carries when the GPU takes no time.

    python -m benchmarks.pipeline [--streams 64] [--tokens 8000] [--json FILE]

The real frontend, tokenizer worker, scheduler and adapter loader, a GPU worker that answers at
once (benchmarks/instant_worker.py), and a client with concurrent SSE streams over HTTP
(benchmarks/load_client.py), all on the same two cores. CPU time is what the kernel charged each
process from the first request to the last end, all its threads; a step is one of the GPU worker's.

The second row gives each step 3 ms, as a device might. The pipeline keeps up, so that each token
is an event and a write of its own; in the first row what waits in a queue travels together.
"""

import argparse
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from benchmarks.load_client import Load
from benchmarks.machine import commit, machine
from pipeline.arena import remove_arena
from pipeline.config import PREFIX, Settings, to_environment
from pipeline.model_folder import model_folder

CORES = 2
STEP_SECONDS = (0.0, 0.003)
MODULES = {
    name: (name,)
    for name in ("frontend", "tokenizer_workers", "scheduler", "adapter_loader", "gpu_worker")
}
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


class Pipeline:
    """The five processes. What each prints is in a file of its name.

    modules  what each process runs: a module and its arguments
    """

    def __init__(
        self, settings: Settings, modules: Mapping[str, Sequence[str]], logs: Path
    ) -> None:
        self._logs = logs
        self._run_folder = settings.run_folder()
        others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environment = {**others, **to_environment(settings), "LORADEX_CONFIG": os.devnull}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        for name, module in modules.items():
            command = [sys.executable, "-m", *module]
            self._processes[name] = self._start(name, command, environment)

    def _start(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> "subprocess.Popen[str]":
        if name == "frontend":  # says when all are ready
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        with (self._logs / name).open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, text=True)

    def wait_until_ready(self) -> None:
        lines: IO[str] | None = self._processes["frontend"].stdout
        assert lines is not None
        if not any("curl" in line for line in lines):
            raise SystemExit("the pipeline did not start")

    def cpu_seconds(self) -> dict[str, float]:
        return {name: cpu_seconds(process.pid) for name, process in self._processes.items()}

    def stop(self) -> None:
        """End all."""
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self._processes.items():
            if code := process.wait(60):
                raise SystemExit(f"{name} ended with {code}")

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        remove_arena(self._run_folder)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_SECONDS


def children_cpu_seconds() -> float:
    """The same of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(streams: int, tokens: int, step_seconds: float, folder: Path) -> dict[str, Any]:
    settings = Settings(
        port=free_port(),
        model_folder=str(model_folder(Settings())),
        run_dir=f"{folder}/run",
        arena_bytes=1 << 20,
        rows=streams,
        step_tokens=max(512, streams),
    )
    modules = {**MODULES, "gpu_worker": ("benchmarks.instant_worker", str(step_seconds))}
    pipeline = Pipeline(settings, modules, folder)
    try:
        pipeline.wait_until_ready()
        before = pipeline.cpu_seconds() | {"client": children_cpu_seconds()}
        load = run_client(settings, str(streams), str(tokens))
        after = pipeline.cpu_seconds() | {"client": children_cpu_seconds()}
        pipeline.stop()
    finally:
        pipeline.kill()
    found = re.search(r"steps=(\d+)", (folder / "gpu_worker").read_text())
    assert found is not None
    steps = int(found[1])
    used = {name: after[name] - before[name] for name in before}
    return {
        "streams": streams,
        "step_seconds": step_seconds,
        **msgspec.structs.asdict(load),
        "steps": steps,
        "tokens_per_second": load.tokens / load.seconds,
        "cpu_microseconds_per_step": {
            name: 1e6 * seconds / steps for name, seconds in used.items()
        },
    }


def run_client(settings: Settings, *arguments: str) -> Load:
    """A load client as a process of its own."""
    client = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.load_client"),
            *(settings.host, str(settings.port), *arguments),
        ],
        stdout=subprocess.PIPE,
        check=False,
    )
    if client.returncode:
        raise SystemExit("the client was not served as it should be")
    return msgspec.json.decode(client.stdout, type=Load)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['tokens_per_second']:.0f} tokens/s, steps of {row['step_seconds'] * 1000:.0f} ms: "
        f"{row['tokens']} tokens over {row['streams']} streams in {row['seconds']:.2f} s, "
        f"{row['events']} events, {row['steps']} steps\n"
    )
    print("| process | CPU per step, µs | of a core |\n|---|---|---|")
    for name, microseconds in row["cpu_microseconds_per_step"].items():
        share = microseconds * row["steps"] / 1e6 / row["seconds"]
        print(f"| {name} | {microseconds:.0f} | {share:.0%} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8000, help="of each stream")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    rows = []
    for step_seconds in STEP_SECONDS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(arguments.streams, arguments.tokens, step_seconds, Path(folder)))
        show(rows[-1])
    if arguments.json:
        result = {"machine": machine(), "commit": commit(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
