"""A whole server, started as a user starts it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from pipeline.arena import known_arena

START_SECONDS = 120


class Server:
    """`loradex serve` and all that it starts. Stop it; what it printed is in `lines`."""

    def __init__(
        self, folder: Path, environment: dict[str, str] | None = None, **settings: Any
    ) -> None:
        self.port = settings.pop("port", None) or free_port()
        self.run_dir = settings.pop("run_dir", folder / "run")
        self.url = f"http://127.0.0.1:{self.port}"
        flags = [f"--port={self.port}", f"--run-dir={self.run_dir}"]
        for name, value in {"arena_bytes": 256 << 20, **settings}.items():
            for one in value if isinstance(value, list | tuple) else [value]:
                flags.append(f"--{name.replace('_', '-')}={one}")
        self._arenas: set[Path] = set()
        self.lines: list[str] = []
        self.ready = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.launch", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("LORADEX_")}
            | (environment or {}),
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if "curl" in line:
                self.ready.set()
        self.ready.set()  # ended

    def wait_until_ready(self) -> "Server":
        assert self.ready.wait(START_SECONDS), self.output()
        assert self._process.poll() is None, self.output()
        arena = known_arena(self.run_dir)
        assert arena is not None
        self._arenas.add(arena)
        return self

    def output(self) -> str:
        return "\n".join(self.lines)

    def pids(self) -> dict[str, int]:
        """process -> pid, as honcho printed them when it started them."""
        found = re.findall(r"(\w+)\.1 started \(pid=(\d+)\)", self.output())
        return {name: int(pid) for name, pid in found}

    def pid(self, process: str, index: int = 0) -> int:
        """Of the incarnation that its keep-alive has started last."""
        found = re.findall(
            rf"process={process} event=started index={index} pid=(\d+)", self.output()
        )
        return int(found[-1])

    def signal(self, process: str, number: int = signal.SIGKILL, index: int = 0) -> None:
        os.kill(self.pid(process, index), number)

    def exit_codes(self) -> dict[str, int]:
        found = re.findall(r"(\w+)\.1 stopped \(rc=(-?\d+)\)", self.output())
        return {name: int(code) for name, code in found}

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        code = self._process.wait(60)
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def kill_everything(self) -> None:
        """kill -9 of honcho and of each process."""
        for pid in (self._process.pid, *self.pids().values()):
            os.kill(pid, signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise

    def leftovers(self) -> list[Path]:
        """What lies in shared memory or the run folder that is this server's."""
        left = list(self.run_dir.glob("*")) if self.run_dir.exists() else []
        return left + [path for path in self._arenas if path.exists()]

    def generate(self, inputs: str, adapter: str | None = None, **parameters: Any) -> Any:
        """The tokens of LoRAX's /generate. Greedy unless the parameters say otherwise."""
        parameters = {
            "adapter_id": adapter,
            "adapter_source": "local" if adapter else None,
            "details": True,
            "ignore_eos_token": True,
            **parameters,
        }
        reply = httpx.post(
            f"{self.url}/generate", json={"inputs": inputs, "parameters": parameters}, timeout=300
        )
        assert reply.status_code == 200, reply.text
        return reply.json()

    def token_ids(self, inputs: str, adapter: str | None = None, **parameters: Any) -> list[int]:
        details = self.generate(inputs, adapter, **parameters)["details"]
        ids = [token["id"] for token in details["tokens"]]
        assert len(ids) == details["generated_tokens"] == parameters["max_new_tokens"]
        return ids

    def metric(self, name: str) -> float:
        """The sum over all samples of that name."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        samples = [line for line in lines if re.match(rf"{name}[ {{]", line)]
        assert samples, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether something comes to hold that no event tells of, such as a statistic."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
