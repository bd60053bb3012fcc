"""How long the scheduler's core takes to decide a step of 256 rows.

    python -m benchmarks.scheduler_step [--steps 2000] [--json FILE]

The real core; the worker and the loader answer at once and are not timed, nor are new requests.
Timed together: `step_done`, `next_work` until there is none, `take_outbox`. Every round does the
same, step by step, and the least of a step's times counts: what a shared machine adds goes away.
Garbage collection is off, as in the scheduler's process.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from array import array
from collections import deque
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import commit, machine
from benchmarks.simulation.rows import Rows
from pipeline.config import Settings
from pipeline.messages import (
    AdapterKey,
    AdapterPlaced,
    AdapterStaged,
    ArenaReady,
    EndsHeard,
    LoadAdapter,
    PlaceAdapter,
    Step,
    StepDone,
    Submit,
    Tokens,
    WorkerReady,
)
from scheduler.core import Envelope, Scheduler

ROWS = 256
BLOCK_TOKENS = 16
ADAPTER_BYTES = 84_000_000
TOKEN = 7
STEP_SECONDS = 0.01  # of the core's clock
WARM_STEPS = 300
ROUNDS = 5


class Load(NamedTuple):
    """What the core has to do with."""

    name: str
    adapters: int  # that requests name, each as often as another; 0: none
    resident: int  # that the pool holds
    waiting: int  # requests beside those that run
    prompt_tokens: int  # on average, half as many at least
    output_tokens: int
    prefix_cache: bool = False


LONG = 1 << 20  # outlasts the benchmark
LOADS = (
    Load("decode, base", 0, 1, 0, 32, LONG),
    Load("decode, 128 adapters", 128, 128, 0, 32, LONG),
    Load("decode, prefix cache", 0, 1, 0, 32, LONG, prefix_cache=True),
    Load("starts and ends, base", 0, 1, 1000, 128, 128),
    Load("1,000 wait for 500 adapters, room for 100", 500, 100, 1000, 128, 128),
    Load("the same with prefix cache", 500, 100, 1000, 128, 128, prefix_cache=True),
)


class Loop:
    """The core and those that answer it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._random = random.Random(0)
        settings = Settings(rows=ROWS, step_tokens=4096, prefix_cache=load.prefix_cache)
        self._core = Scheduler(settings=settings, eos_token_ids=())
        self._rows = Rows(ROWS)
        self._steps: deque[StepDone] = deque()
        self._copies: deque[int] = deque()  # slots
        self._loads: deque[AdapterKey] = deque()
        self._offset = 0
        self._now = 0.0
        self._submitted = 0
        self._core.worker_ready(
            WorkerReady(
                ROWS * 400,
                BLOCK_TOKENS,
                load.resident * ADAPTER_BYTES,
                1024,
                ROWS,
                step_tokens=4096,
            ),
            0.0,
        )
        self._core.arena_ready(ArenaReady("arena", 1 << 40))
        self._submit(ROWS + load.waiting)
        self._work()

    def step(self) -> float:
        """Returns the seconds that the core took."""
        self._now += STEP_SECONDS
        self._answer()
        done = self._steps.popleft()
        start = time.perf_counter()
        self._core.step_done(done, self._now)
        work: list[PlaceAdapter | Step] = []
        outbox = self._core.take_outbox()
        while (one := self._core.next_work(self._now)) is not None:
            work.append(one)
        outbox += self._core.take_outbox()
        seconds = time.perf_counter() - start
        self._take(work, outbox)
        return seconds

    def _work(self) -> None:
        work: list[PlaceAdapter | Step] = []
        while (one := self._core.next_work(self._now)) is not None:
            work.append(one)
        self._take(work, self._core.take_outbox())

    def _answer(self) -> None:
        """Two loads and all copies have come since the last step."""
        for _ in range(min(2, len(self._loads))):
            key = self._loads.popleft()
            self._offset += 1
            staged = AdapterStaged(key, key.id, self._offset, ADAPTER_BYTES, b"")
            self._core.adapter_staged(staged, self._now)
        while self._copies:
            self._core.adapter_placed(AdapterPlaced(self._copies.popleft()))
        if not self._steps:
            self._work()

    def _take(self, work: list[PlaceAdapter | Step], outbox: list[Envelope]) -> None:
        for one in work:
            if isinstance(one, PlaceAdapter):
                self._copies.append(one.copy.slot)
                continue
            sampled = self._rows.apply(one).sampled
            tokens = array("i", [TOKEN] * sampled).tobytes()
            self._steps.append(StepDone(one.step_id, tokens))
        ended: list[int] = []
        for _, _, message in outbox:
            if isinstance(message, LoadAdapter):
                self._loads.append(message.adapter)
            elif isinstance(message, Tokens):
                ended += [one.request_id for one in message.finished]
        if ended:
            self._core.ends_heard(EndsHeard(ended), self._now)
        self._submit(len(ended))

    def _submit(self, count: int) -> None:
        """As many as have ended, of ten tenants."""
        for _ in range(count):
            self._submitted += 1
            adapter = self._random.randrange(self._load.adapters) if self._load.adapters else None
            if self._load.adapters and not self._load.waiting:
                adapter = self._submitted % self._load.adapters
            middle = self._load.prompt_tokens
            prompt = array("i", [TOKEN]) * self._random.randint(middle // 2, middle * 3 // 2)
            prompt[0] = self._submitted
            # the first ones are at different points of their replies
            early = self._submitted <= ROWS and self._load.waiting
            shortest = 1 if early else self._load.output_tokens
            submit = Submit(
                request_id=self._submitted,
                worker=0,
                arrived=self._now,
                token_ids=prompt.tobytes(),
                max_tokens=self._random.randint(shortest, self._load.output_tokens),
                adapter=None if adapter is None else AdapterKey("local", f"adapter {adapter}"),
                tenant=f"tenant {(adapter or self._submitted) % 10}",
            )
            self._core.submit(submit, self._now)

    @property
    def running(self) -> int:
        return self._core.figures().requests_running


def measure(load: Load, steps: int) -> dict[str, str | float]:
    """Microseconds."""
    gc.collect()
    gc.disable()
    rounds = [_round(Loop(load), steps) for _ in range(ROUNDS)]
    gc.enable()
    times = sorted(min(step) for step in zip(*(times for times, _ in rounds), strict=True))
    return {
        "load": load.name,
        "rows": round(statistics.mean(rounds[0][1]), 1),
        "median_us": round(statistics.median(times), 1),
        "p99_us": round(times[len(times) * 99 // 100], 1),
    }


def _round(loop: Loop, steps: int) -> tuple[list[float], list[int]]:
    """The time of each step, and the rows that ran then."""
    for _ in range(WARM_STEPS):
        loop.step()
    times, rows = [], []
    for _ in range(steps):
        times.append(loop.step() * 1e6)
        rows.append(loop.running)
    return times, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for load in LOADS:
        rows.append(measure(load, given.steps))
        print(rows[-1], flush=True)
    if given.json is not None:
        command = " ".join(["python -m benchmarks.scheduler_step", *sys.argv[1:]])
        head = {"machine": machine(), "commit": commit(), "command": command}
        given.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
