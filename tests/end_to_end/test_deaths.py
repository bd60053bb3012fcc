"""Processes are killed, or stopped, while 64 streams run: no reply misses or repeats a token."""

import asyncio
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server, eventually

STREAMS = 64
ADAPTERS = [f"adapter-{number}" for number in range(8)]
CANDIDATES = 90  # of which so many streams are chosen
TOKENS = 40
KILLS = 30
WORKER_KILLS = 6  # of these; a start takes the worker seconds, and a death of one that is not
# ready disturbs nobody
OTHERS = (
    "adapter_loader",
    "tokenizer_workers",
)  # that are killed while the worker starts, and after that
PROGRESS = 100  # tokens between a start of the worker and its next death
HANG_SECONDS = 3.0
WORDS = "Once upon a time there was a server that nobody could kill and"
TEMPERATURE = 0.01  # a sixteenth of what the logits spread
CLOSE_CALL = 1e-4  # of the temperature; rounding does a hundredth of it
CLOSE_LOGPROBS = 1e-5  # rounding does a fiftieth of it


class Stream(NamedTuple):
    """A request, and the tokens of its undisturbed reply."""

    body: dict[str, Any]
    tokens: list[int]


def request(number: int, temperature: float = TEMPERATURE) -> dict[str, Any]:
    """Every second one is greedy; prompts differ in length and share beginnings."""
    parameters: dict[str, Any] = {
        "adapter_id": ADAPTERS[number % len(ADAPTERS)],
        "adapter_source": "local",
        "max_new_tokens": TOKENS,
        "ignore_eos_token": True,
        "details": True,
    }
    if number % 2:
        parameters |= {"do_sample": True, "temperature": temperature, "min_p": 0.1}
        parameters["seed"] = number
    words = WORDS.split()
    return {"inputs": " ".join(words[: 3 + number % 9]) + f" {number}", "parameters": parameters}


async def generate(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    reply = await client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    details: dict[str, Any] = reply.json()["details"]
    return details


def ids(details: dict[str, Any]) -> list[int]:
    return [token["id"] for token in details["tokens"]]


async def undisturbed(server: Server) -> list[Stream]:
    """Replies in which no token is a close call.

    What is computed again after a death is computed in other batches, so that logits differ in
    their last bits. Where the likeliest two tokens are as close as that, or a boundary of the
    distribution lies so close to the random number, either token is right, and such requests say
    nothing here.
    """
    async with client_of(server) as client:

        async def is_steady(number: int) -> Stream | None:
            body = request(number)
            if number % 2:
                near = [request(number, TEMPERATURE * (1 + sign * CLOSE_CALL)) for sign in (-1, 1)]
                replies = [ids(await generate(client, one)) for one in (body, *near)]
                steady = replies[0] == replies[1] == replies[2]
                return Stream(body, replies[0]) if steady else None
            body["parameters"]["top_n_tokens"] = 2
            details = await generate(client, body)
            del body["parameters"]["top_n_tokens"]
            gaps = [first["logprob"] - second["logprob"] for first, second in details["top_tokens"]]
            return Stream(body, ids(details)) if min(gaps) > CLOSE_LOGPROBS else None

        found = await asyncio.gather(*(is_steady(number) for number in range(CANDIDATES)))
    steady = [stream for stream in found if stream is not None]
    greedy = [one for one in steady if "seed" not in one.body["parameters"]][: STREAMS // 2]
    seeded = [one for one in steady if "seed" in one.body["parameters"]][: STREAMS // 2]
    assert len(greedy) == len(seeded) == STREAMS // 2, (len(greedy), len(seeded))
    assert len({tuple(one.tokens) for one in steady}) == len(steady)  # else they say little
    return greedy + seeded


def client_of(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=None)
    )


class Load:
    """All streams, each asked for again as soon as it has ended, until told to stop."""

    def __init__(self, server: Server, streams: list[Stream]) -> None:
        self._server = server
        self._streams = streams
        self.tokens = 0  # that came
        self.replies = 0
        self.stopping = False

    async def run(self) -> None:
        async with client_of(self._server) as client:
            await asyncio.gather(*(self._repeat(client, stream) for stream in self._streams))

    async def _repeat(self, client: httpx.AsyncClient, stream: Stream) -> None:
        while not self.stopping:
            assert await self._read(client, stream) == stream.tokens
            self.replies += 1

    async def _read(self, client: httpx.AsyncClient, stream: Stream) -> list[int]:
        tokens = []
        async with client.stream("POST", "/generate_stream", json=stream.body) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    assert "error" not in event, event
                    tokens.append(event["token"]["id"])
                    self.tokens += 1
        return tokens

    async def progress(self, tokens: int) -> None:
        """Wait until so many more have come."""
        goal = self.tokens + tokens
        deadline = time.monotonic() + 60
        while self.tokens < goal:
            assert time.monotonic() < deadline, self._server.output()[-5000:]
            await asyncio.sleep(0.01)


def is_healthy(server: Server) -> bool:
    return httpx.get(server.url + "/health").status_code == 200


@pytest.fixture(scope="module")
def running(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("deaths")
    model = tiny.make_model(folder / "model", model_folder)
    for seed, name in enumerate(ADAPTERS):
        tiny.make_adapter(folder / "root" / name, model, seed, std=0.01)
    server = serve(
        model_folder=model,
        adapter_root=folder / "root",
        dtype="float32",
        hang_seconds=HANG_SECONDS,
        restart_limit=100,
        restart_backoff_seconds=0,
        stats_seconds=0.2,
    )
    yield server
    assert eventually(lambda: is_healthy(server), 30)
    server.stop()
    assert set(server.exit_codes().values()) == {0}, server.output()[-5000:]
    assert server.leftovers() == []


@pytest.fixture
def server(running: Server) -> Server:
    """It has got over what the test before did to it."""
    assert eventually(lambda: is_healthy(running), 30)
    return running


@pytest.fixture(scope="module")
def streams(running: Server) -> list[Stream]:
    return asyncio.run(undisturbed(running))


async def under_load(server: Server, streams: list[Stream], disturb: Callable[[Load], Any]) -> Load:
    load = Load(server, streams)
    running = asyncio.create_task(load.run())
    disturbing = asyncio.create_task(disturb(load))
    await asyncio.wait({running, disturbing}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        disturbing.cancel()
        await running  # something failed
    await disturbing
    load.stopping = True
    await running
    return load


def test_deaths_at_random_moments_change_no_reply(server: Server, streams: list[Stream]) -> None:
    moments = random.Random(6)

    async def kill(load: Load) -> None:
        killed = dict.fromkeys(("gpu_worker", *OTHERS), 0)  # the latest of each

        async def kill_one(process: str) -> None:
            while server.pid(process) == killed[process]:  # it has not been started again
                await asyncio.sleep(0.01)
            killed[process] = server.pid(process)
            server.signal(process)

        others_left = KILLS - WORKER_KILLS
        for round_ in range(WORKER_KILLS):
            await load.progress(moments.randrange(PROGRESS, 3 * PROGRESS))
            await kill_one("gpu_worker")
            for _ in range(others_left // (WORKER_KILLS - round_)):
                others_left -= 1
                await asyncio.sleep(moments.uniform(0, 0.8))  # the moment is what is varied
                await kill_one(moments.choice(OTHERS))
        await load.progress(PROGRESS)

    before = server.output().count("event=died")
    load = asyncio.run(under_load(server, streams, kill))
    assert server.output().count("event=died") - before >= KILLS
    assert load.replies >= STREAMS
    assert eventually(lambda: is_healthy(server), 30)
    assert eventually(lambda: server.metric("loradex_process_restarts_total") >= KILLS)


@pytest.mark.parametrize("process", ["gpu_worker", *OTHERS])
def test_one_that_hangs_is_replaced(server: Server, streams: list[Stream], process: str) -> None:
    async def stop(load: Load) -> None:
        await load.progress(PROGRESS)
        dead = server.pid(process)
        server.signal(process, signal.SIGSTOP)
        assert await asyncio.to_thread(eventually, lambda: server.pid(process) != dead, 30)
        await load.progress(PROGRESS)

    asyncio.run(under_load(server, streams, stop))
    assert f"cause='no sign of life for {HANG_SECONDS:g} s'" in server.output()


def test_while_a_worker_is_away_the_server_is_not_healthy_and_requests_wait(
    server: Server, streams: list[Stream]
) -> None:
    server.signal("gpu_worker")
    assert eventually(lambda: not is_healthy(server))
    reason = httpx.get(server.url + "/health").json()["error"]
    assert "waiting for gpu_worker; gpu_worker died: signal 9 (Killed)" in reason
    [reply] = asyncio.run(all_of(server, streams[:1]))
    assert reply == streams[0].tokens
    assert is_healthy(server)


async def all_of(server: Server, streams: list[Stream]) -> list[list[int]]:
    async with client_of(server) as client:
        return [ids(await generate(client, stream.body)) for stream in streams]


@pytest.mark.parametrize("process", ["scheduler", "frontend"])
def test_the_others_end_all_requests_and_the_server_serves_again(
    server: Server, streams: list[Stream], process: str
) -> None:
    async def ends(client: httpx.AsyncClient, stream: Stream) -> str:
        """How a stream that was cut off ends."""
        try:
            async with client.stream("POST", "/generate_stream", json=stream.body) as reply:
                lines = [line async for line in reply.aiter_lines() if line.startswith("data:")]
        except httpx.TransportError:
            return "closed"
        event = json.loads(lines[-1].removeprefix("data:"))
        return str(event.get("error", "whole"))

    async def kill() -> list[str]:
        async with client_of(server) as client:
            running = [asyncio.create_task(ends(client, stream)) for stream in streams]
            loaded = await asyncio.to_thread(
                eventually, lambda: server.metric("loradex_requests_running") > 0
            )
            assert loaded
            server.signal(process)
            return await asyncio.gather(*running)

    ended = asyncio.run(kill())
    started = time.monotonic()
    assert eventually(lambda: serves(server, streams[0]), 10)
    assert time.monotonic() - started < 10
    cut_off = [one for one in ended if one != "whole"]
    assert cut_off
    said = "closed" if process == "frontend" else "a process of the server died"
    assert all(said in one for one in cut_off)
    assert asyncio.run(all_of(server, streams[:8])) == [one.tokens for one in streams[:8]]


def serves(server: Server, stream: Stream) -> bool:
    try:
        return asyncio.run(all_of(server, [stream])) == [stream.tokens]
    except (httpx.TransportError, AssertionError):
        return False
