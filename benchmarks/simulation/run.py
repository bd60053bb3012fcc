"""One scenario under one policy: the real scheduler core between simulated clients and engine."""

import resource
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulation import cost
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.engine import TOKEN, Engine, Loader
from benchmarks.simulation.measured import Measured
from benchmarks.simulation.watched import Watched
from benchmarks.simulation.workload import Request
from pipeline.config import Settings
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterPlaced,
    AdapterStaged,
    ArenaReady,
    EndsHeard,
    LoadAdapter,
    ReleaseAdapter,
    Step,
    StepDone,
    Submit,
    Tokens,
    WorkerReady,
)
from scheduler.core import Scheduler
from scheduler.policy import Policy

ARENA_BYTES = 64 << 30
POOL_BYTES = 24_000_000_000  # a fifth of what weights leave free
KV_BLOCKS = 46_000  # of 16 tokens
SETTINGS = Settings(
    rows=256,
    step_tokens=4096,
    max_tenant_waiting=1000,
    loader_threads=4,
    max_concurrent_requests=100_000,
)


class Outcome(NamedTuple):
    """Of one request that was accepted."""

    tenant: str
    hot: bool  # its adapter was resident when it arrived
    first_token_seconds: float


class Run:
    """policy: None for the product's own."""

    def __init__(self, policy: Policy, requests: Iterable[Request]) -> None:
        self._clock = Clock()
        self._requests: Iterator[Request] = iter(requests)
        self.watched = Watched(policy)
        self.measured = Measured(self.watched)
        self._core = Scheduler(settings=SETTINGS, eos_token_ids=(), policy=self.measured)
        self._engine = Engine(
            self._clock, rows=SETTINGS.rows, done=self._step_done, placed=self._placed
        )
        self._loader = Loader(
            self._clock,
            arena_bytes=ARENA_BYTES,
            threads=SETTINGS.loader_threads,
            answer=self._answered,
        )
        self._open: dict[int, tuple[str, bool]] = {}
        self._submitted = 0
        self._tokens = 0  # prompt and output, of requests that ended
        self._asked_tokens_per_second = 0.0  # computed until the last arrival
        self._asked_adapters_per_step = 0.0
        self._processor_before = _processor_seconds()
        self.outcomes: list[Outcome] = []
        self.refused = 0

    def run(self) -> None:
        ready = WorkerReady(
            KV_BLOCKS, 16, POOL_BYTES, SETTINGS.adapter_slots, SETTINGS.rows, step_tokens=4096
        )
        self._core.worker_ready(ready, 0.0)
        self._core.arena_ready(ArenaReady("arena", ARENA_BYTES))
        self._expect_next()
        self._settle()
        while self._clock.advance():
            self.measured.look(self._clock.now)
            self._settle()
        assert self._core.idle, "a request waits for ever"

    def _expect_next(self) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._clock.at(request.arrival, lambda: self._arrive(request))
        elif self._clock.now:
            engine = self._engine
            self._asked_tokens_per_second = engine.tokens / self._clock.now
            self._asked_adapters_per_step = engine.adapters / max(engine.steps, 1)

    def _arrive(self, request: Request) -> None:
        self._submitted += 1
        key = AdapterKey("local", request.adapter)
        self._open[self._submitted] = (request.tenant, key in self.measured.resident)
        prompt = array("i", [TOKEN]) * request.prompt_tokens
        prompt[0] = self._submitted  # so that no two begin alike
        submit = Submit(
            request_id=self._submitted,
            worker=0,
            arrived=request.arrival,
            token_ids=prompt.tobytes(),
            max_tokens=request.output_tokens,
            adapter=key,
            tenant=request.tenant,
        )
        self._core.submit(submit, self._clock.now)
        self._expect_next()

    def _step_done(self, message: StepDone) -> None:
        self._core.step_done(message, self._clock.now)

    def _placed(self, message: AdapterPlaced) -> None:
        self._core.adapter_placed(message)

    def _answered(self, message: AdapterStaged | AdapterFailed | AdapterDropped) -> None:
        if isinstance(message, AdapterDropped):
            self._core.adapter_dropped(message, self._clock.now)
            return
        assert isinstance(message, AdapterStaged), message
        self._core.adapter_staged(message, self._clock.now)

    def _settle(self) -> None:
        """As the scheduler's process does after each message."""
        self._deliver()
        while (work := self._core.next_work(self._clock.now)) is not None:
            if isinstance(work, Step):
                self._engine.send(work)
            else:
                self._engine.place(work)
        self._deliver()

    def _deliver(self) -> None:
        for _, _, message in self._core.take_outbox():
            if isinstance(message, Tokens):
                self._note_ends(message)
            elif isinstance(message, LoadAdapter | ReleaseAdapter):
                self._loader.send(message)

    def _note_ends(self, message: Tokens) -> None:
        if message.finished:
            heard = EndsHeard([end.request_id for end in message.finished])
            self._core.ends_heard(heard, self._clock.now)
        for end in message.finished:
            tenant, hot = self._open.pop(end.request_id)
            if end.failure is not None:
                assert end.failure.status == 429, end.failure
                self.refused += 1
                continue
            usage = end.usage
            self._tokens += usage.prompt_tokens + usage.completion_tokens
            self.outcomes.append(Outcome(tenant, hot, usage.first_token_seconds))

    def figures(self, suspects: Iterable[str]) -> dict[str, Any]:
        """What the run has shown; times to first token in seconds."""
        suspects = set(suspects)
        victims = [one for one in self.outcomes if one.tenant not in suspects]
        others = [one for one in self.outcomes if one.tenant in suspects]
        busiest, above, within = self._by_demand()
        indices = self.measured.indices
        core = self._core.figures()
        return {
            "requests": self._submitted,
            "refused": self.refused,
            "seconds": self._clock.now,
            "tokens_per_second": self._tokens / self._clock.now,
            "asked_tokens_per_second": self._asked_tokens_per_second,
            "asked_adapters_per_step": self._asked_adapters_per_step,
            "busy": self._engine.busy_seconds / self._clock.now,
            "steps": core.steps,
            "preemptions": core.preemptions,
            "packed": self._loader.packed,
            "first_token": {
                "victims": _percentiles(victims),
                "victims_hot": _percentiles([one for one in victims if one.hot]),
                "victims_cold": _percentiles([one for one in victims if not one.hot]),
                "suspects": _percentiles(others),
                "busiest": _percentiles(busiest),
                "above_equal": _percentiles(above),
                "within_equal": _percentiles(within),
            },
            "jain": sum(indices) / len(indices) if indices else None,
            "jain_windows": len(indices),
            "longest_passed_seconds": self.watched.longest,
            "processor_seconds": _processor_seconds() - self._processor_before,
        }

    def _by_demand(self) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
        """Of the tenant that asked most, of those that asked for more than an equal part, and of
        the others."""
        counts = Counter(one.tenant for one in self.outcomes)
        equal = len(self.outcomes) / max(len(counts), 1)
        busiest = {name for name, _ in counts.most_common(1)}
        above = {name for name, count in counts.items() if count > equal}
        return (
            [one for one in self.outcomes if one.tenant in busiest],
            [one for one in self.outcomes if one.tenant in above],
            [one for one in self.outcomes if one.tenant not in above],
        )


def _processor_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _percentiles(outcomes: list[Outcome]) -> dict[str, float] | None:
    if not outcomes:
        return None
    times = np.array([one.first_token_seconds for one in outcomes])
    p50, p99 = np.percentile(times, (50, 99))
    mean = float(times.mean())
    return {"requests": len(outcomes), "mean": mean, "p50": float(p50), "p99": float(p99)}


ACTIVE_ADAPTERS = POOL_BYTES // cost.ADAPTER_BYTES
