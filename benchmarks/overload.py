"""Ten times the load that a server can bear: what it admits is served as at the limit.

    python -m benchmarks.overload [--seconds 60] [--factor 10] [--leaks 10000] [--json FILE]

A tiny model on the CPU behind all processes of a node, and clients in a process for each four cores
of the same machine: on two cores they take from the server what they need. First the sustainable
rate is measured, with as many clients as rows, each of which asks again when it is answered. Then
requests come at that rate (the run at the limit), at `factor` times it, and again at half of it,
from the moment at which the overload ends: the time until nobody is refused and the queue is empty.
Last come --leaks requests, of which a third leave at a random moment; blocks, rows, file
descriptors and memory are compared with those of the idle server before. Memory is that of all
processes, without what is shared.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.client import LEFT, Outcome, ask
from benchmarks.machine import commit, machine
from benchmarks.node import IDLE, Node, words, write_scene
from benchmarks.soak import quantile

ROWS, PLACES = 16, 20  # that run, and that are admitted
TOKENS = (32, 96)  # of a reply, each number as often; of one length, rows would end in step
ADAPTERS = tuple(f"good-{number}" for number in range(4))
CLIENTS = 18  # that ask at once in the leak test: none is refused
CLIENT_PROCESSES = max(1, len(os.sched_getaffinity(0)) // 4)
MOST = 400  # clients of ours that wait at once; what would be more is not sent, and counted


class Bench:
    def __init__(self, node: Node, clients: Executor) -> None:
        self._node = node
        self._clients = clients
        self._random = random.Random(0)

    async def sustainable(self, seconds: float) -> float:
        """Requests per second that as many clients as there are rows are answered."""
        until, answered = time.monotonic() + seconds, 0

        async def client() -> None:
            nonlocal answered
            while time.monotonic() < until:
                outcome = await self._one()
                answered += outcome.status == 200

        await asyncio.gather(*(client() for _ in range(ROWS)))
        return answered / seconds

    async def offer(self, rate: float, seconds: float) -> dict[str, Any]:
        """Requests come at this rate whatever becomes of them."""
        clients, peak = self._clients, 0
        loop = asyncio.get_running_loop()
        parts = [
            loop.run_in_executor(
                clients, offer, self._node.port, rate / CLIENT_PROCESSES, seconds, seed
            )
            for seed in range(CLIENT_PROCESSES)
        ]
        offered = asyncio.gather(*parts)
        while not offered.done():
            peak = max(peak, sum((await asyncio.to_thread(self._node.memory)).values()))
            await asyncio.wait([offered], timeout=1.0)
        outcomes = [one for outcomes, _ in offered.result() for one in outcomes]
        unsent = sum(unsent for _, unsent in offered.result())
        admitted = sorted(one.seconds for one in outcomes if one.status == 200)
        refused = [one for one in outcomes if one.status == 429]
        return {
            "rate": rate,
            "offered_per_second": (len(outcomes) + unsent) / seconds,
            "unsent": unsent,
            "statuses": Counter(str(one.status) for one in outcomes),
            "admitted_per_second": len(admitted) / seconds,
            "p50_seconds": quantile(admitted, 0.5),
            "p99_seconds": quantile(admitted, 0.99),
            "refused_with_retry_after": sum(one.tells_to_retry for one in refused),
            "peak_bytes": peak,
        }

    async def recovered(self) -> float:
        """Seconds until the server is idle and a request is answered, after the load has gone."""
        started = time.monotonic()
        while True:
            found = await asyncio.to_thread(self._node.metrics)
            if not any(found.get(name) for name in IDLE) and (await self._one()).status == 200:
                return time.monotonic() - started
            await asyncio.sleep(0.1)

    async def leaks(self, requests: int) -> dict[str, Any]:
        """What the idle server holds more than before, after so many of which a third has left."""
        await self._many(requests // 10)  # so that all code has run
        await self.recovered()
        memory, files = self._node.memory(), self._node.files()
        statuses = await self._many(requests)
        await self.recovered()
        now, open_now = self._node.memory(), self._node.files()
        return {
            "requests": requests,
            "statuses": statuses,
            "held": dict.fromkeys(IDLE, 0),  # else recovered would not have returned
            "grown_bytes": {name: now[name] - memory[name] for name in memory},
            "grown_files": {name: open_now[name] - files[name] for name in files},
        }

    async def _many(self, requests: int) -> "Counter[str]":
        statuses: Counter[str] = Counter()
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                leaves = self._random.random() < 1 / 3
                one = await self._one(self._random.uniform(0, 0.3) if leaves else None)
                statuses["left" if one.status == LEFT else str(one.status)] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return statuses

    async def _one(self, leave_after: float | None = None) -> Outcome:
        return await one(self._node.port, self._random, leave_after)


async def one(port: int, throws: random.Random, leave_after: float | None = None) -> Outcome:
    body = {
        "model": throws.choice(("", *ADAPTERS)),
        "prompt": words(throws.randrange(1 << 30), 16),
        "max_tokens": throws.randint(*TOKENS),
        "ignore_eos": True,
        "stream": True,
    }
    return await ask(port, "/v1/completions", body, leave_after=leave_after)


def offer(port: int, rate: float, seconds: float, seed: int) -> tuple[list[Outcome], int]:
    """What becomes of requests that come at this rate, and how many were not sent at all. In a
    process of its own."""
    return asyncio.run(_offer(port, rate, seconds, random.Random(seed)))


async def _offer(
    port: int, rate: float, seconds: float, throws: random.Random
) -> tuple[list[Outcome], int]:
    outcomes, unsent = list[Outcome](), 0
    running = set[asyncio.Task[Outcome]]()
    started = at = time.monotonic()
    while (at := at + throws.expovariate(rate)) < started + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        if len(running) < MOST:
            task = asyncio.create_task(one(port, throws))
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(lambda done: outcomes.append(done.result()))
        else:
            unsent += 1
    await asyncio.gather(*running)
    return outcomes, unsent


async def measure(
    node: Node, clients: Executor, seconds: float, factor: float, leaks: int
) -> dict[str, Any]:
    bench = Bench(node, clients)
    await bench.sustainable(3)
    rate = await bench.sustainable(min(10.0, seconds))
    result: dict[str, Any] = {"sustainable_per_second": rate}
    result["at_limit"] = await bench.offer(rate, seconds)
    await bench.recovered()
    before = sum(node.memory().values())
    result["overload"] = await bench.offer(factor * rate, seconds)
    result["recovery_seconds"] = await bench.recovered()
    result["idle_bytes"] = {"before": before, "after": sum(node.memory().values())}
    result["after"] = await bench.offer(rate / 2, min(10.0, seconds))
    result["p99_ratio"] = result["overload"]["p99_seconds"] / result["at_limit"]["p99_seconds"]
    if leaks:
        result["leaks"] = await bench.leaks(leaks)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--leaks", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loradex-") as name:
        folder = Path(name)
        settings = {
            **write_scene(folder, ADAPTERS),
            "rows": ROWS,
            "max_concurrent_requests": PLACES,
            "adapter_pool_bytes": 16 << 20,  # small, as the next: pages count when they are touched
            "kv_cache_bytes": 16 << 20,
            "cache": folder / "cache",
        }
        node = Node(folder, settings)
        try:
            with ProcessPoolExecutor(CLIENT_PROCESSES, get_context("spawn")) as clients:
                result = asyncio.run(
                    measure(node, clients, arguments.seconds, arguments.factor, arguments.leaks)
                )
            node.terminate()
            wrong = node.end()
        finally:
            node.kill()
    result = {"machine": machine(), "commit": commit(), "rows": ROWS, "places": PLACES, **result}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
