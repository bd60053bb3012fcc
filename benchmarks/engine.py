"""The running pipeline without HTTP: scheduler, worker and loader as processes of their own.

The benchmark is the frontend and the tokenizer worker. It binds their inboxes, sends `Submit` and
takes tokens, so that requests are token ids and what is measured is the rest.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pipeline.arena import remove_arena
from pipeline.channels import Inbox, Outbox
from pipeline.config import PREFIX, Settings, to_environment
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterKey,
    Cancel,
    EndsHeard,
    Finished,
    FinishReason,
    Prefetch,
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
PR_SET_PDEATHSIG = 1


class Request(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    token_ids: "array[int]"
    max_tokens: int
    adapter: str | None = None  # the name of a local one
    sampling: Sampling = GREEDY
    grammar: str = ""  # of pipeline.grammars.source_of


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
        self.settings = settings
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._requests = 0
        self._replies: dict[int, Reply] = {}  # of requests that run
        self._families_of: dict[str, Families] = {}  # as each process reported last
        self._reports: Counter[str] = Counter()  # of each process
        self._heard = 0.0  # when a token came last, or the first request since all had ended
        self.facts: dict[str, dict[str, Any]] = {}  # what each process says of itself
        self.start_seconds = 0.0

    def __enter__(self) -> "Engine":
        run_dir = run_folder(self.settings)
        self._logs.mkdir(parents=True, exist_ok=True)
        self._frontend = Inbox[ToFrontend](run_dir, "frontend", 0, ToFrontend)
        self._tokens = Inbox[ToTokenizerWorker](run_dir, "tokenizer_workers", 0, ToTokenizerWorker)
        self._outbox = Outbox(run_dir)
        peers = ("frontend", "tokenizer_workers")
        self._peers = [Outbox(run_dir, Incarnation(peer)) for peer in peers]
        for peer in self._peers:  # who is not known, is told nothing
            for name in PROCESSES:
                peer.greet(name)
        start = time.monotonic()
        try:
            for name in PROCESSES:
                self._processes[name] = start_process(name, self.settings, self._logs / name)
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
            sampling=request.sampling,
            ignore_eos=True,
            grammar=request.grammar,
        )
        if not self._replies:
            self._heard = now
        reply = self._replies[self._requests] = Reply(request, now)
        self._outbox.send("scheduler", message)
        return reply

    def receive(self, seconds: float) -> list[Reply]:
        """Take what has arrived; waits so long for something. Returns those that have ended.

        Raises SystemExit if one failed, if a process died, or if nothing comes any more.
        """
        ended = []
        messages = self._tokens.receive(max(0, round(seconds * 1000)))
        for message in messages:
            assert isinstance(message, Tokens)
            now = self._heard = time.monotonic()
            for request_id in message.request_ids:
                if request_id in self._replies:  # else it was cancelled
                    self._replies[request_id].times.append(now)
            if message.finished:
                heard = [finished.request_id for finished in message.finished]
                self._outbox.send("scheduler", EndsHeard(heard))
            for finished in message.finished:
                reply = self._replies.pop(finished.request_id, None)
                if reply is not None:
                    reply.finished = finished
                    reply.check()
                    ended.append(reply)
        if not messages:
            self._check_processes()
            if self._replies and time.monotonic() - self._heard > SILENCE_SECONDS:
                raise SystemExit(f"no token for {SILENCE_SECONDS:.0f} s\n{self._tails()}")
        return ended

    def finish(self) -> None:
        """Wait until every request has ended."""
        while self._replies:
            self.receive(1.0)

    def run(self, requests: Iterable[Request]) -> list[Reply]:
        """All requests at once, to the end of the last."""
        replies = [self.submit(request) for request in requests]
        self.finish()
        return replies

    def cancel_all(self) -> None:
        """Nothing is expected any more."""
        for request_id in self._replies:
            self._outbox.send("scheduler", Cancel(request_id))
        self._replies.clear()

    def prefetch(self, adapter: AdapterKey, tenant: str = "") -> None:
        """Have an adapter loaded without a request for it, unless that is one too many for this
        tenant."""
        self._outbox.send("scheduler", Prefetch(adapter, tenant=tenant))

    def pid(self, process: str) -> int:
        return self._processes[process].pid

    # --- what the processes say ---

    def metrics(self) -> Metrics:
        """As they stand now."""
        is_current = self.reporting()

        def take(message: ToFrontend) -> bool:
            self._note(message)
            return is_current()

        self._await("metrics", take, SILENCE_SECONDS)
        return Metrics(self._families_of)

    def reporting(self) -> Callable[[], bool]:
        """Tells whether `latest_metrics` are those of now or later: the second report of a process
        from now on was surely written after now."""
        self.latest_metrics()
        before = self._reports.copy()

        def is_current() -> bool:
            return all(self._reports[process] >= before[process] + 2 for process in PROCESSES)

        return is_current

    def latest_metrics(self) -> Metrics:
        """As they were reported last, without waiting."""
        while messages := self._frontend.receive(0):
            for message in messages:
                self._note(message)
        return Metrics(self._families_of)

    def _note(self, message: ToFrontend) -> None:
        if isinstance(message, Stats):
            self._families_of[message.process] = message.families
            self._reports[message.process] += 1

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
        for outbox in (self._outbox, *self._peers):
            outbox.close(0)
        self._tokens.close()
        self._frontend.close()
        remove_arena(self.settings.run_folder())


def start_process(name: str, settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    """Start one of the server's processes; what it prints goes to `log`. It ends with this one."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", name],
            cwd=ROOT,
            env={**others, **to_environment(settings), "LORADEX_CONFIG": os.devnull},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """In a child, before it becomes the process: a benchmark that is killed leaves no server."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
