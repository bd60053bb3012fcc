"""More than a server can bear, clients that leave, and an end in the middle of it."""

import asyncio
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.client import LEFT, Outcome, ask
from benchmarks.node import IDLE, PROCESSES, anonymous, open_files, totals
from tests.end_to_end.server import Server, eventually

REQUESTS = int(os.environ.get("LEAK_TEST_REQUESTS", "300"))  # 10000 takes minutes
ADAPTERS = ("one", "two")
PLACES = 24
CACHE_BYTES = 40 << 20  # that a GPU worker on a CPU may still fill: see benchmarks.soak
GROWN_BYTES = 24 << 20  # of one process; what a request leaves behind would be far more


@pytest.fixture(scope="module")
def server(serve_tiny: Callable[..., Server]) -> Server:
    return serve_tiny(
        *ADAPTERS,
        max_concurrent_requests=PLACES,
        stats_seconds=0.1,
        rows=16,
        # small: pages of both count when they are touched for the first time
        adapter_pool_bytes=8 << 20,
        kv_cache_bytes=8 << 20,
    )


def body(number: int, tokens: int, **changes: Any) -> dict[str, Any]:
    return {
        "model": ("", *ADAPTERS)[number % 3],
        "prompt": f"Number {number}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        **changes,
    }


async def ask_all(server: Server, bodies: list[dict[str, Any]]) -> list[Outcome]:
    return await asyncio.gather(*(ask(server.port, "/v1/completions", one) for one in bodies))


def is_idle(server: Server) -> bool:
    found = totals(httpx.get(server.url + "/metrics", timeout=30).text)
    return not any(found[name] for name in IDLE)


def test_beyond_its_places_it_says_429_and_serves_those_it_let_in(server: Server) -> None:
    outcomes = asyncio.run(ask_all(server, [body(at, 48) for at in range(10 * PLACES)]))
    refused = [one for one in outcomes if one.status == 429]
    assert refused
    assert all(one.tells_to_retry for one in refused)
    served = [one for one in outcomes if one.status == 200]
    assert len(served) >= PLACES
    assert all(one.ends == 1 and one.body.endswith(b"data: [DONE]\n\n") for one in served)
    assert len(served) + len(refused) == len(outcomes)
    assert eventually(lambda: is_idle(server), seconds=5)
    assert httpx.post(server.url + "/v1/completions", json=body(1, 4)).status_code == 200


def test_nothing_is_left_of_clients_that_leave(server: Server) -> None:
    throws = random.Random(0)

    async def run(requests: int) -> list[Outcome]:
        numbers, outcomes = iter(range(requests)), list[Outcome]()

        async def client() -> None:
            for number in numbers:
                leave = throws.uniform(0, 0.1) if throws.random() < 1 / 3 else None
                outcomes.append(
                    await ask(server.port, "/v1/completions", body(number, 24), leave_after=leave)
                )

        await asyncio.gather(*(client() for _ in range(PLACES - 4)))
        return outcomes

    def held() -> dict[str, tuple[int, int]]:
        assert eventually(lambda: is_idle(server))
        pids = {name: server.pid(name) for name in PROCESSES}
        return {name: (anonymous(pid), open_files(pid)) for name, pid in pids.items()}

    asyncio.run(run(max(100, REQUESTS // 5)))  # so that all code has run, and caches are filled
    before = held()
    outcomes = asyncio.run(run(REQUESTS))
    after = held()
    assert {one.status for one in outcomes} <= {200, LEFT, 429}
    assert sum(one.status == LEFT for one in outcomes) > REQUESTS / 10
    for name, (nbytes, files) in after.items():
        most = GROWN_BYTES + (CACHE_BYTES if name == "gpu_worker" else 0)
        assert nbytes <= before[name][0] + most, name
        assert files <= before[name][1] + 2, name


def test_a_deadline_ends_a_request_in_every_process(server: Server) -> None:
    late = body(1, 400, timeout=0.05)
    [stream, whole] = asyncio.run(ask_all(server, [late, {**late, "stream": False}]))
    assert b"deadline_exceeded" in stream.body
    assert stream.ends == 1
    assert whole.status == 504
    assert eventually(lambda: is_idle(server), seconds=5)


def streams_and_a_sigterm(server: Server, streams: int, tokens: int) -> list[list[str]]:
    """The events of streams that all run when the server is told to end."""
    everybody_streams = threading.Barrier(streams, timeout=60)

    def stream(number: int) -> list[str]:
        asked = body(number, tokens)
        with httpx.stream("POST", server.url + "/v1/completions", json=asked, timeout=60) as reply:
            events = []
            for line in reply.iter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                if len(events) == 1 and everybody_streams.wait() == 0:
                    server.terminate()
        return events

    with ThreadPoolExecutor(streams) as threads:
        running = [threads.submit(stream, number) for number in range(streams)]
        turned = eventually(lambda: httpx.get(server.url + "/health").status_code == 503)
        assert turned or all(one.done() for one in running)
        assert not all(one.done() for one in running) or not turned
        return [one.result() for one in running]


def test_64_streams_end_well_after_sigterm_and_then_the_server(
    serve_tiny: Callable[..., Server],
) -> None:
    server = serve_tiny(*ADAPTERS)
    told = streams_and_a_sigterm(server, 64, 480)
    assert all(events[-1] == "[DONE]" for events in told)
    server.wait()
    assert set(server.exit_codes().values()) == {0}, server.output()
    assert server.leftovers() == list[Path]()


def test_64_streams_that_outlast_the_deadline_are_told_so(
    serve_tiny: Callable[..., Server],
) -> None:
    server = serve_tiny(*ADAPTERS, drain_seconds=0.3)
    told = streams_and_a_sigterm(server, 64, 480)
    cut = [events for events in told if "shutting_down" in events[-1]]
    assert cut
    assert all(events[-1] == "[DONE]" for events in told if events not in cut)
    server.wait()
    assert set(server.exit_codes().values()) == {0}, server.output()
    assert server.leftovers() == list[Path]()
