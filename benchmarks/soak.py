"""A server under everything at once, for long: does anything leak, hang, or answer otherwise?

    python -m benchmarks.soak [--seconds 1200] [--clients 48] [--seed 0] [--no-kills]
        [--out FILE.svg]

A tiny model on the CPU behind all processes of a node. Clients ask at random, over all routes that
generate or embed: the base model and adapters that are good, bad, or come from a server that
stalls; streamed and not; greedy and sampled; with deadlines; a third of them leave in the middle.
Beside them bad input, and administrators who load, unload, pin and unpin. The run is in two phases,
or as many as are of five minutes. In every second one GPU worker, tokenizer worker and adapter
loader are killed now and then. Each phase begins with a new server, which is asked the greedy
requests in quiet; it ends with all load gone, when every tier has to be empty, and with SIGTERM
while 64 streams run.

Fails if a greedy reply is not that of the quiet run, a request has not exactly one end or an
unexpected status, something is held when nobody asks, memory or file descriptors grow from one idle
state to a later one of the same processes, or the drain loses a stream.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.client import BROKEN, LEFT, Outcome, ask
from benchmarks.machine import commit, machine
from benchmarks.nobody_waits import stalling_server
from benchmarks.node import IDLE, Node, words, write_scene
from benchmarks.soak_plot import draw

PHASE_SECONDS = 300.0
GOOD = tuple(f"good-{number}" for number in range(12))
BAD = ("truncated", "no-weights", "no-config", "missing")
LOAD_SECONDS = 2.0  # after which the stalling server's adapters have failed
STREAMS = 64  # that a drain ends
KILLED = ("gpu_worker", "tokenizer_workers", "adapter_loader")
QUIET_SECONDS = 10.0  # to give everything back in
# Of each process, from an idle state with all code warm to the next. On a CPU the GPU worker still
# fills its caches then: stacks of adapters, at most 16 MB here, and oneDNN's primitives.
GROWN_BYTES = {
    "gpu_worker": 64 << 20,
    "frontend": 16 << 20,
    "tokenizer_workers": 16 << 20,
    "scheduler": 16 << 20,
    "adapter_loader": 48 << 20,
}
GROWN_FILES = 8
REFUSED = {400, 403, 404, 405, 413, 415, 422, 424}
UNAVAILABLE = {429, 503}  # overloaded; an adapter that does not come
DEADLINE = 504
BROKEN_BODIES: tuple[tuple[bytes, str], ...] = (
    (b"{", "application/json"),
    (b"[" * 5000, "application/json"),
    (b'{"model":"","prompt":"\xff"}', "application/json"),
    (b'{"model":"","prompt":1e999}', "application/json"),
    (b'{"model":"","prompt":"w1","max_tokens":-1}', "application/json"),
    (b'{"model":"","prompt":"w1","temperature":"hot"}', "application/json"),
    (b'{"model":"../../etc","prompt":"w1"}', "application/json"),
    (b'{"model":"","prompt":"w1","guided_regex":"(("}', "application/json"),
    (b"prompt=w1", "application/x-www-form-urlencoded"),
)


def completion(adapter: str, number: int, tokens: int, **changes: Any) -> tuple[str, Any]:
    body = {"model": adapter, "prompt": words(number, 12), "max_tokens": tokens, "temperature": 0}
    return "/v1/completions", {**body, "ignore_eos": True, **changes}


GREEDY = [completion(GOOD[at % 8] if at % 3 else "", at, 24) for at in range(16)]


class Soak:
    """One phase: a server, and all that is done to it."""

    def __init__(self, folder: Path, settings: dict[str, Any], seed: int, origin: str) -> None:
        self._node = Node(folder, settings)
        self._port = self._node.port
        self._random = random.Random(seed)
        self._origin = origin
        self._expected: list[Any] = []
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.samples: list[dict[str, float]] = []
        self._latencies: list[float] = []
        self._sent = self._seen = 0
        self._over = False

    async def run(self, seconds: float, clients: int, kills: bool) -> None:
        self._expected = [text_of(await ask(self._port, *one)) for one in GREEDY]
        await self._load(min(5.0, seconds / 4), clients, kills=False)  # all code has run
        await self._come_to_rest()
        before = self._node.memory(), self._node.files()
        await self._load(seconds, clients, kills)
        await self._come_to_rest()
        self._compare(*before, kills)
        await self._drain()

    def kill(self) -> None:
        self._node.kill()

    def last_lines(self) -> list[str]:
        """Of what the server said."""
        return self._node.lines[-30:]

    async def _load(self, seconds: float, clients: int, kills: bool) -> None:
        until = time.monotonic() + seconds
        counted = self._node.metrics().get("loradex_http_requests_total", 0.0)
        self._sent = self._seen = 0
        watch = asyncio.create_task(self._watch(until))
        tasks = [self._client(until) for _ in range(clients)]
        tasks += [self._administrator(until), self._vandal(until, kills)]
        if kills:
            tasks.append(self._killer(until))
        await asyncio.gather(*tasks)
        await watch
        # one status for each request, 499 for those that have left; some leave before they are read
        await asyncio.sleep(0.5)
        counted = self._node.metrics()["loradex_http_requests_total"] - counted
        if not kills and not self._seen <= counted <= self._sent:
            self.wrong.append(f"{self._seen}-{self._sent} requests, {counted:.0f} were counted")

    async def _client(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self._random.choices(
                ("greedy", "any", "leave", "bad adapter", "slow adapter", "deadline"),
                (4, 5, 5, 1, 0.3, 0.7),
            )[0]
            if kind == "greedy":
                at = self._random.randrange(len(GREEDY))
                outcome = await self._ask(kind, *GREEDY[at], allowed=UNAVAILABLE | {200})
                if outcome.status == 200 and text_of(outcome) != self._expected[at]:
                    self.wrong.append(f"greedy request {at} was answered otherwise than in quiet")
            elif kind == "bad adapter":
                adapter = self._random.choice(BAD)
                path, body = completion(adapter, 1, 8, adapter_source="local")
                await self._ask(kind, path, body, allowed=REFUSED | UNAVAILABLE)
            elif kind == "slow adapter":
                adapter = f"{self._origin}/{self._random.randrange(3)}"
                path, body = completion(adapter, 1, 8, adapter_source="http")
                await self._ask(kind, path, body, allowed=UNAVAILABLE)
            elif kind == "deadline":
                path, body = completion("", 1, 1500, timeout=self._random.uniform(0.01, 0.2))
                body["stream"] = self._random.random() < 0.5
                await self._ask(kind, path, body, allowed=UNAVAILABLE | {DEADLINE, 200})
            else:
                path, body = self._any()
                leave = self._random.expovariate(5) if kind == "leave" else None
                await self._ask(kind, path, body, allowed=UNAVAILABLE | {200}, leave_after=leave)

    def _any(self) -> tuple[str, Any]:
        """A request of any route that generates or embeds, which is as it should be."""
        draw = self._random
        adapter, tokens = draw.choice(("", *GOOD)), draw.choice((1, 8, 32, 128))
        text = words(draw.randrange(1000), draw.choice((1, 8, 64, 300)))
        stream = draw.random() < 0.5
        match draw.randrange(6):
            case 0 | 1:
                body = {"model": adapter, "prompt": text, "max_tokens": tokens, "stream": stream}
                return "/v1/completions", {**body, "n": draw.choice((1, 1, 3))}
            case 2:
                messages = [{"role": "user", "content": text}]
                body = {"model": adapter, "messages": messages, "max_tokens": tokens}
                return "/v1/chat/completions", {**body, "stream": stream}
            case 3 | 4:
                parameters = {"adapter_id": adapter or None, "max_new_tokens": tokens}
                path = "/generate_stream" if stream else "/generate"
                return path, {"inputs": text, "parameters": {**parameters, "do_sample": True}}
            case _:
                return "/v1/embeddings", {"model": adapter, "input": [text] * draw.choice((1, 5))}

    async def _administrator(self, until: float) -> None:
        """Names come and go, pins too; what is refused because of another's is in order."""
        while time.monotonic() < until:
            adapter, name = self._random.choice(GOOD), f"name-{self._random.randrange(4)}"
            path, body = self._random.choice(
                (
                    ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": adapter}),
                    ("/v1/unload_lora_adapter", {"lora_name": name}),
                    ("/v1/adapters/pin", {"adapter_id": adapter, "adapter_source": "local"}),
                    ("/v1/adapters/unpin", {"adapter_id": adapter, "adapter_source": "local"}),
                )
            )
            await self._ask("administration", path, body, allowed=REFUSED | UNAVAILABLE | {200})
            await asyncio.sleep(0.05)

    async def _vandal(self, until: float, kills: bool) -> None:
        paths = ("/v1/completions", "/v1/chat/completions", "/generate", "/v1/embeddings", "/nope")
        while time.monotonic() < until:
            body, content_type = self._random.choice(BROKEN_BODIES)
            path = self._random.choice(paths)
            allowed = REFUSED | ({503} if kills else set())  # when who should look has died
            await self._ask("bad input", path, body, allowed=allowed, content_type=content_type)
            await asyncio.sleep(0.02)

    async def _killer(self, until: float) -> None:
        while time.monotonic() < until - 15:
            await asyncio.sleep(self._random.uniform(3, 10))
            name = self._random.choice(KILLED)
            for pid in self._node.pids()[name][:1]:
                os.kill(pid, signal.SIGKILL)
                self.counts[f"killed {name}"] += 1

    async def _ask(
        self, kind: str, path: str, body: Any, *, allowed: set[int], **named: Any
    ) -> Outcome:
        self._sent += 1
        outcome = await ask(self._port, path, body, **named)
        self.counts[f"{kind}: {outcome.status}"] += 1
        if outcome.status == LEFT:
            return outcome
        self._seen += 1
        self._latencies.append(outcome.seconds)
        if outcome.status not in allowed:
            said = outcome.body[:200].decode(errors="replace")
            self.wrong.append(f"{kind} on {path}: status {outcome.status}: {said}")
        elif outcome.ends != 1:
            self.wrong.append(f"{kind} on {path}: {outcome.ends} ends: {outcome.body[-200:]!r}")
        elif outcome.status == 429 and not outcome.tells_to_retry:
            self.wrong.append(f"{kind} on {path}: 429 without Retry-After")
        return outcome

    async def _watch(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(1.0)
            found = await asyncio.to_thread(self._node.metrics)
            memory = self._node.memory()
            latencies, self._latencies = sorted(self._latencies), []
            self.samples.append(
                {
                    "at": time.time(),
                    **{f"memory {name}": float(nbytes) for name, nbytes in memory.items()},
                    "running": found.get("loradex_requests_running", 0.0),
                    "waiting": found.get("loradex_requests_waiting", 0.0),
                    "p50": quantile(latencies, 0.5),
                    "p99": quantile(latencies, 0.99),
                }
            )

    async def _come_to_rest(self) -> None:
        """Nobody asks any more: all tiers give back what they hold."""
        deadline = time.monotonic() + QUIET_SECONDS
        for path in ("unload_lora_adapter", "adapters/unpin"):
            names = [f"name-{at}" for at in range(4)] if "lora" in path else list(GOOD)
            for name in names:
                body = {"lora_name": name, "adapter_id": name, "adapter_source": "local"}
                await ask(self._port, f"/v1/{path}", body)
        held = {}
        while time.monotonic() < deadline:
            await asyncio.sleep(0.3)
            found = await asyncio.to_thread(self._node.metrics)
            wanted = (*IDLE, "loradex_adapters_pinned")
            held = {name: found.get(name) for name in wanted if found.get(name)}
            if not held:
                return
        self.wrong.append(f"held when nobody asks: {held}")

    def _compare(self, memory: dict[str, int], files: dict[str, int], kills: bool) -> None:
        """What has grown since the last time that nobody asked."""
        now, open_now = self._node.memory(), self._node.files()
        grown = {name: now[name] - memory[name] for name in memory}
        for name, nbytes in grown.items():
            self.counts[f"grown {name}, MB"] += max(0, nbytes) >> 20
        if not kills and any(grown[name] > most for name, most in GROWN_BYTES.items()):
            self.wrong.append(f"memory has grown: {grown}")
        more = {name: open_now[name] - files[name] for name in files}
        if not kills and max(more.values()) > GROWN_FILES:
            self.wrong.append(f"file descriptors: {more}")

    async def _drain(self) -> None:
        """SIGTERM while streams run: they end well, then the server."""
        streams = [
            asyncio.create_task(
                ask(self._port, *completion(GOOD[at % 8], at, 400, stream=True), headers="")
            )
            for at in range(STREAMS)
        ]
        while (await asyncio.to_thread(self._node.metrics))["loradex_requests_in_flight"] < STREAMS:
            if any(stream.done() for stream in streams):
                break
            await asyncio.sleep(0.02)
        self._node.terminate()
        outcomes = await asyncio.gather(*streams)
        lost = [one.status for one in outcomes if one.status != 200 or one.ends != 1]
        if lost:
            self.wrong.append(f"the drain lost {len(lost)} of {STREAMS} streams: {lost[:5]}")
        self.wrong += await asyncio.to_thread(self._node.end)


def text_of(outcome: Outcome) -> Any:
    return json.loads(outcome.body)["choices"][0]["text"] if outcome.status == 200 else None


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def spoil(root: Path) -> None:
    """Make the bad adapters of good ones; `missing` stays missing."""
    for name, path in (("no-weights", "adapter_model.safetensors"), ("no-config", "")):
        (root / name / (path or "adapter_config.json")).unlink()
    weights = root / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def main(say: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-kills", action="store_true", help="in no phase")
    parser.add_argument("--out", type=Path, help="an SVG; a JSON file comes beside it")
    arguments = parser.parse_args()
    phases = max(2, round(arguments.seconds / PHASE_SECONDS))
    counts, samples, wrong = Counter[str](), list[dict[str, float]](), list[str]()
    with tempfile.TemporaryDirectory(prefix="loradex-") as name, stalling_server() as origin:
        folder = Path(name)
        settings = {
            **write_scene(folder, [*GOOD, "truncated", "no-weights", "no-config"]),
            "http_host": origin,
            "adapter_load_seconds": LOAD_SECONDS,
            "failed_load_seconds": 0.5,
            "allow_adapter_admin": "true",
            "cache": folder / "cache",
            "adapter_pool_bytes": 2 << 20,  # not all adapters fit
            "kv_cache_bytes": 8 << 20,  # some are preempted
            "max_concurrent_requests": 80,
            "restart_limit": 100_000,  # what is killed all the time comes back at once
            "restart_backoff_seconds": 0,
        }
        spoil(folder / "adapters")
        for phase in range(phases):
            soak = Soak(folder, settings, arguments.seed + phase, origin)
            kills = phase % 2 == 1 and not arguments.no_kills
            try:
                asyncio.run(soak.run(arguments.seconds / phases, arguments.clients, kills))
            except BaseException:
                say("\n".join(soak.last_lines()))
                raise
            finally:
                soak.kill()
            counts += soak.counts
            samples += soak.samples
            wrong += soak.wrong
            say(f"phase {phase + 1} of {phases}: {len(soak.wrong)} wrong")
    for kind, count in sorted(counts.items()):
        say(f"  {kind}: {count}")
    if arguments.out:
        arguments.out.write_text(draw(samples))
        head = {"machine": machine(), "commit": commit(), "seconds": arguments.seconds}
        result = {**head, "counts": counts, "wrong": wrong, "samples": samples}
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    broken = sum(count for kind, count in counts.items() if kind.endswith(f": {BROKEN}"))
    say(f"{sum(counts.values())} events, {broken} broken connections, {len(wrong)} wrong")
    for sentence, count in Counter(wrong).most_common(50):
        say(f"WRONG: {sentence} ({count} times)")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
