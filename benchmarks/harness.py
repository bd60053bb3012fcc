"""The running pipeline without HTTP: scheduler, worker and loader as processes of their own.

The benchmark is the frontend and the tokenizer worker. It binds their inboxes, sends `Submit` and
takes tokens, so that requests are token ids and what is measured is the rest.
"""

import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pipeline.arena import arena_path
from pipeline.channels import Inbox, Outbox
from pipeline.config import PREFIX, Settings, load_settings, to_environment
from pipeline.messages import (
    AdapterKey,
    Finished,
    FinishReason,
    ProcessReady,
    Sampling,
    Shutdown,
    Stats,
    Submit,
    ToFrontend,
    Tokens,
    ToTokenizerWorker,
)
from pipeline.metrics import Families
from pipeline.process import run_folder

ROOT = Path(__file__).parent.parent
PROCESSES = ("scheduler", "adapter_loader", "gpu_worker")
START_SECONDS = 300.0
SILENCE_SECONDS = 120.0  # without any token, while some are due
STOP_SECONDS = 30.0
LOG_TAIL = 3000  # characters
GREEDY = Sampling(temperature=0)
STATS_SECONDS = 0.2  # how often processes report


class Request(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    token_ids: "array[int]"
    max_tokens: int
    adapter: str | None = None  # the name of a local one


class Reply:
    """What came of a request. Times are those of time.monotonic()."""

    __slots__ = ("finished", "request", "submitted", "times")

    def __init__(self, request: Request, submitted: float) -> None:
        self.request = request
        self.submitted = submitted
        self.times: list[float] = []  # when each token arrived
        self.finished: Finished | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.submitted

    def check(self) -> None:
        """Raises SystemExit if it is not as long as it was asked for."""
        finished = self.finished
        if finished is None or finished.reason is not FinishReason.LENGTH:
            raise SystemExit(f"a request for adapter {self.request.adapter} failed: {finished}")
        if len(self.times) != self.request.max_tokens:
            raise SystemExit(f"{len(self.times)} tokens instead of {self.request.max_tokens}")


class Metrics:
    """The counters of all processes at one moment."""

    def __init__(self, families_of: Mapping[str, Families]) -> None:
        self._value_of = {
            (process, sample, tuple(sorted(labels.items()))): value
            for process, families in families_of.items()
            for _, _, _, samples in families
            for sample, labels, value in samples
        }

    def total(self, process: str, name: str, **labels: str) -> float | None:
        """The sum over samples with these labels, among others; None where there is none."""
        found = [
            value
            for (of_process, sample, given), value in self._value_of.items()
            if of_process == process and sample == name and set(labels.items()) <= set(given)
        ]
        return sum(found) if found else None

    def since(self, before: "Metrics", process: str, name: str, **labels: str) -> float | None:
        """How much a counter has grown."""
        now = self.total(process, name, **labels)
        return None if now is None else now - (before.total(process, name, **labels) or 0.0)


class Engine:
    """The three processes and this one. A context manager; what each prints is in logs/NAME.

    settings   with a run_dir and a model_folder
    logs       folder for what the processes print
    """

    def __init__(self, settings: Settings, logs: Path) -> None:
        self._settings = settings
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._requests = 0
        self._replies: dict[int, Reply] = {}  # of requests that run
        self.facts: dict[str, dict[str, Any]] = {}  # what each process says of itself
        self.start_seconds = 0.0

    def __enter__(self) -> "Engine":
        run_dir = run_folder(self._settings)
        self._logs.mkdir(parents=True, exist_ok=True)
        self._frontend = Inbox[ToFrontend](run_dir, "frontend", 0, ToFrontend)
        self._tokens = Inbox[ToTokenizerWorker](run_dir, "tokenizer_workers", 0, ToTokenizerWorker)
        self._outbox = Outbox(run_dir)
        start = time.monotonic()
        try:
            others = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
            environment = {
                **others,
                **to_environment(self._settings),
                "LORADEX_CONFIG": os.devnull,
            }
            for name in PROCESSES:
                with (self._logs / name).open("wb") as log:
                    self._processes[name] = subprocess.Popen(
                        [sys.executable, "-m", name],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
            self._wait_until_ready()
        except BaseException:
            self._close(0)
            raise
        self.start_seconds = time.monotonic() - start
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._outbox.send("scheduler", Shutdown("tokenizer_workers"))
        self._close(STOP_SECONDS if kind is None else 0)

    # --- requests ---

    def submit(self, request: Request) -> Reply:
        """Send a request; `receive` fills in what comes of it."""
        self._requests += 1
        now = time.monotonic()
        adapter = None if request.adapter is None else AdapterKey("local", request.adapter)
        message = Submit(
            self._requests,
            0,
            arrived=now,
            token_ids=request.token_ids.tobytes(),
            max_tokens=request.max_tokens,
            adapter=adapter,
            sampling=GREEDY,
            ignore_eos=True,
        )
        reply = self._replies[self._requests] = Reply(request, now)
        self._outbox.send("scheduler", message)
        return reply

    def receive(self, seconds: float) -> list[Reply]:
        """Take what has arrived; waits so long for something. Returns those that have ended."""
        ended = []
        for message in self._tokens.receive(max(0, round(seconds * 1000))):
            now = time.monotonic()
            assert isinstance(message, Tokens)
            replies = self._replies
            for request_id in message.request_ids:
                replies[request_id].times.append(now)
            for finished in message.finished:
                reply = replies.pop(finished.request_id)
                reply.finished = finished
                reply.check()
                ended.append(reply)
        return ended

    def finish(self) -> None:
        """Wait until every request has ended. Raises SystemExit if nothing comes any more."""
        silent_since = time.monotonic()
        known = 0
        while self._replies:
            self.receive(1.0)
            arrived = sum(len(reply.times) for reply in self._replies.values())
            if arrived != known:
                known, silent_since = arrived, time.monotonic()
            self._check_processes()
            if time.monotonic() - silent_since > SILENCE_SECONDS:
                raise SystemExit(f"no token for {SILENCE_SECONDS:.0f} s\n{self._tails()}")

    def run(self, requests: Iterable[Request]) -> list[Reply]:
        """All requests at once, to the end of the last."""
        replies = [self.submit(request) for request in requests]
        self.finish()
        return replies

    # --- what the processes say ---

    def metrics(self) -> Metrics:
        """As they stand now: the second report from now on was surely written after now."""
        while self._frontend.receive(0):
            pass
        families_of: dict[str, Families] = {}
        reports = dict.fromkeys(PROCESSES, 0)

        def take(message: ToFrontend) -> bool:
            if isinstance(message, Stats) and message.process in reports:
                reports[message.process] += 1
                families_of[message.process] = message.families
            return min(reports.values()) >= 2

        self._await("metrics", take, SILENCE_SECONDS)
        return Metrics(families_of)

    def _wait_until_ready(self) -> None:
        def take(message: ToFrontend) -> bool:
            if isinstance(message, ProcessReady):
                self.facts[message.process] = message.facts
            return len(self.facts) == len(PROCESSES)

        self._await("ready messages", take, START_SECONDS)

    def _await(self, what: str, take: Callable[[ToFrontend], bool], seconds: float) -> None:
        """Give each message to the frontend to `take` until it says that this is enough."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for message in self._frontend.receive(100):
                if take(message):
                    return
            self._check_processes()
        raise SystemExit(f"no {what} within {seconds:.0f} s\n{self._tails()}")

    def _check_processes(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with {process.returncode}\n{self._tails()}")

    def _tails(self) -> str:
        return "\n".join(
            f"--- {name}\n{(self._logs / name).read_text(errors='replace')[-LOG_TAIL:]}"
            for name in self._processes
        )

    # --- the end ---

    def _close(self, seconds: float) -> None:
        """Give each process so long to end by itself."""
        for process in self._processes.values():
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._outbox.close(0)
        self._tokens.close()
        self._frontend.close()
        arena_path(self._settings.run_folder()).unlink(missing_ok=True)


def settings_from(defaults: Mapping[str, Any], changes: Sequence[str]) -> Settings:
    """`changes` are texts like rows=64, as on the command line. Raises SystemExit."""
    given = dict(defaults)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise SystemExit(f"--set {change}: expected NAME=VALUE")
        given[name] = text
    return load_settings(given, {"LORADEX_CONFIG": os.devnull})


def gaps(replies: Iterable[Reply]) -> Iterator[float]:
    """The times between two tokens of a reply, seconds."""
    for reply in replies:
        yield from (later - earlier for earlier, later in pairwise(reply.times))
