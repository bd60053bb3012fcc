"""How long replies pause when a process is killed, and whether any is lost.

    python -m benchmarks.deaths [--model llama-3.1-8b] [--streams 64] [--tokens 1500]
        [--processes gpu_worker adapter_loader tokenizer_workers] [--set NAME=VALUE ...]
        [--json FILE]

`loradex serve` as users start it, random weights and 8 adapters of rank 16. Streams of
/generate_stream, greedy, ends ignored; for each process, once all of them have a tenth of their
tokens, it gets SIGKILL. The pause is the longest that a stream had between two tokens from then on;
`serves after` is from the kill to the first token after that pause. A reply is whole if it has all
of its tokens; `equal` counts those with the tokens of an undisturbed round. They may differ where
the same tokens are computed in another batch and rounded otherwise.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.adapters import AdapterKind
from benchmarks.harness import Scene, common_options, prepare
from benchmarks.machine import commit, machine
from benchmarks.models import make_tokenizer
from benchmarks.pipeline import free_port
from pipeline.config import PREFIX, Settings, to_environment

ADAPTERS = 8
PROCESSES = ("gpu_worker", "adapter_loader", "tokenizer_workers")
WORDS = 100  # of a prompt
START_SECONDS = 180.0
_STARTED = re.compile(r"process=(?P<process>\w+) event=started index=0 pid=(?P<pid>\d+)")


class Reply(NamedTuple):
    """Of one stream: its tokens, and when each came."""

    tokens: list[int]
    times: list[float]


class Node:
    """The server, and the processes behind its keep-alives."""

    def __init__(self, settings: Settings) -> None:
        others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environment = {**others, **to_environment(settings), "LORADEX_CONFIG": os.devnull}
        self.url = f"http://127.0.0.1:{settings.port}"
        self._pids: dict[str, int] = {}
        self._ready = threading.Event()
        self.start_seconds = -time.monotonic()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "honcho", "start"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(START_SECONDS):
            raise SystemExit("the server did not start")
        self.start_seconds += time.monotonic()

    def kill(self, process: str) -> None:
        os.kill(self._pids[process], signal.SIGKILL)

    def stop(self) -> None:
        self._server.terminate()
        self._server.wait()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if found := _STARTED.search(line):
                self._pids[found["process"]] = int(found["pid"])
            if "curl" in line:  # the line that says how it is used
                self._ready.set()


class Streams:
    """All of a round."""

    def __init__(self, url: str, count: int, tokens: int) -> None:
        self._url = url
        self._tokens = tokens
        self.replies = [Reply([], []) for _ in range(count)]

    async def run(self, killed: tuple[Node, str] | None) -> float:
        """Returns when the process was killed."""
        limits = httpx.Limits(max_connections=None)
        moment = 0.0
        async with httpx.AsyncClient(timeout=None, limits=limits) as client:
            reading = asyncio.gather(
                *(self._read(client, index) for index in range(len(self.replies)))
            )
            if killed is not None:
                while any(len(one.tokens) < self._tokens // 10 for one in self.replies):
                    await asyncio.sleep(0.01)
                    if reading.done():
                        break
                node, process = killed
                moment = time.monotonic()
                node.kill(process)
            await reading
        return moment

    async def _read(self, client: httpx.AsyncClient, index: int) -> None:
        words = " ".join(f"w{(index * 131 + at * 7) % 30_000}" for at in range(WORDS))
        parameters = {
            "max_new_tokens": self._tokens,
            "ignore_eos_token": True,
            "adapter_id": name_of(index % ADAPTERS),
            "adapter_source": "local",
        }
        body = {"inputs": words, "parameters": parameters}
        reply = self.replies[index]
        async with client.stream("POST", f"{self._url}/generate_stream", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    if "token" in event:
                        reply.tokens.append(event["token"]["id"])
                        reply.times.append(time.monotonic())


def name_of(adapter: int) -> str:
    return f"adapter-{adapter}"


def row_of(process: str, killed: float, replies: Sequence[Reply], quiet: Streams) -> dict[str, Any]:
    gaps = [gap for one in replies for gap in pairwise(one.times) if gap[1] > killed]
    before, after = max(gaps, key=lambda gap: gap[1] - gap[0], default=(killed, killed))
    expected = [one.tokens for one in quiet.replies]
    return {
        "killed": process,
        "pause_seconds": after - before,
        "serves_after_seconds": after - killed if process else None,
        "whole": sum(
            len(one.tokens) == len(other) for one, other in zip(replies, expected, strict=True)
        ),
        "equal": sum(one.tokens == other for one, other in zip(replies, expected, strict=True)),
        "streams": len(replies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--processes", nargs="+", choices=PROCESSES, default=PROCESSES)
    common_options(parser)
    given = parser.parse_args()
    kind = AdapterKind()
    scene = Scene(
        model=given.model,
        kinds=[(name_of(number), kind) for number in range(ADAPTERS)],
        settings={"port": free_port(), "max_concurrent_requests": given.streams},
        changes=given.set,
        distinct=ADAPTERS,
    )
    with tempfile.TemporaryDirectory(prefix="loradex-bench-") as folder:
        settings, _ = prepare(scene, Path(folder))
        make_tokenizer(Path(settings.model_folder))
        node = Node(settings)
        rows = []
        print("| killed | longest pause, s | serves after, s | whole | equal | streams |")
        print("|---|---|---|---|---|---|")
        try:
            quiet = Streams(node.url, given.streams, given.tokens)
            asyncio.run(quiet.run(None))
            for process in ("", *given.processes):
                streams = Streams(node.url, given.streams, given.tokens)
                killed = asyncio.run(streams.run((node, process) if process else None))
                row = row_of(process, killed, streams.replies, quiet)
                rows.append(row)
                after = row["serves_after_seconds"]
                print(
                    f"| {process or 'nothing'} | {row['pause_seconds']:.2f} "
                    f"| {'' if after is None else f'{after:.2f}'} "
                    f"| {row['whole']} | {row['equal']} | {row['streams']} |",
                    flush=True,
                )
        finally:
            node.stop()
    print(f"\n{machine()}, commit {commit()}; ready after {node.start_seconds:.1f} s")
    if given.json is not None:
        command = " ".join(["python -m benchmarks.deaths", *sys.argv[1:]])
        head = {
            "machine": machine(),
            "commit": commit(),
            "command": command,
            "start_seconds": node.start_seconds,
        }
        given.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
