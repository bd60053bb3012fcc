"""The core with a fake worker and a fake loader around it, moved by hand."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from benchmarks.simulation.watched import Watched
from pipeline.choices import request_ids
from pipeline.config import Settings
from pipeline.messages import (
    GONE,
    AdapterDescription,
    AdapterKey,
    AdapterList,
    AdminCommand,
    AdminDone,
    AdminVerb,
    Aliases,
    AliasesTaken,
    ArenaReady,
    AttachArena,
    Cancel,
    CompileGrammar,
    EndsHeard,
    Failure,
    Finished,
    FinishReason,
    ForgetAdapter,
    GrammarCompiled,
    Leased,
    ListAdapters,
    LoadAdapter,
    Logprobs,
    Pooling,
    Prefetch,
    PromptLogprobs,
    ReleaseAdapter,
    Resumed,
    Sampling,
    Span,
    Spans,
    Step,
    StillOpen,
    Submit,
    Tokens,
    Usage,
)
from scheduler.core import Envelope, Scheduler
from scheduler.fair_share import FairShare
from tests.scheduler.fake_loader import NOT_FOUND, FakeLoader
from tests.scheduler.fake_worker import EOS, FakeWorker

SETTINGS = Settings(rows=4, step_tokens=16, max_wait_seconds=1000.0, adapter_load_seconds=100.0)


def key(adapter: str) -> AdapterKey:
    return AdapterKey("local", adapter)


class Loader(Protocol):
    """What takes the place of the fake loader."""

    @property
    def arena(self) -> Mapping[int, str]: ...

    def send(self, message: LoadAdapter | Leased | ReleaseAdapter | ForgetAdapter) -> None: ...


class World:
    """Whatever happens, what the core says is delivered at once."""

    def __init__(
        self,
        *,
        kv_blocks: int = 32,
        block_tokens: int = 4,
        pool_bytes: int = 4096,
        slots: int = 8,
        started: bool = True,
        loader: Loader | None = None,
        **settings: Any,
    ) -> None:
        self.settings = msgspec.structs.replace(SETTINGS, **settings)
        self.fair_share = FairShare(
            max_overtaking_seconds=self.settings.max_overtaking_seconds,
            max_tenant_running=self.settings.max_tenant_running,
            rows=self.settings.rows,
        )
        self.watched = Watched(self.fair_share)
        self.spans: list[Span] = []
        self.core = Scheduler(settings=self.settings, eos_token_ids=(EOS,), policy=self.watched)
        self.loader = FakeLoader()
        self._to_loader = self.loader if loader is None else loader
        self._sizes = {
            "kv_blocks": kv_blocks,
            "block_tokens": block_tokens,
            "pool_bytes": pool_bytes,
            "slots": slots,
        }
        self.worker = self._new_worker(**self._sizes)
        self.now = 0.0
        self.sent: list[Envelope] = []  # all that ever left the outbox
        self.requests: dict[int, Submit] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[bytes]] = {}  # by request, as they came
        self.prompt_logprobs: dict[int, list[bytes]] = {}
        self.finished: dict[int, Finished] = {}
        self.cancelled: set[int] = set()
        self.heard: set[int] = set()  # ends that came to their frontend
        self.stopped: set[int] = set()  # by their tokenizer worker
        self.dead: set[int] = set()  # tokenizer workers
        self.unheard: set[int] = set()  # what a worker that died had, until it is submitted again
        self.before: dict[int, list[int]] = {}  # tokens that it had
        self.commands: dict[int, AdminCommand] = {}
        self.done: dict[int, Failure | None] = {}  # commands that are answered
        self.names = [Aliases(0, {})] * self.settings.frontends  # as each was told them
        self.listed: dict[str, AdapterDescription] = {}
        self.arena_attached = False
        self.compiling: list[CompileGrammar] = []  # by the worker
        if started:
            self.worker_ready()
            self.arena_ready()

    def _new_worker(self, **sizes: int) -> FakeWorker:
        return FakeWorker(
            arena=self._to_loader.arena,
            rows=self.settings.rows,
            step_tokens=self.settings.step_tokens,
            chunk_tokens=self.settings.prefill_chunk_tokens or self.settings.step_tokens,
            **sizes,
        )

    # --- what happens ---

    def worker_ready(self) -> None:
        self.core.worker_ready(self.worker.ready, self.now)
        self.settle()

    def arena_ready(self) -> None:
        self.core.arena_ready(ArenaReady("/dev/shm/arena", 1 << 20))
        self.settle()
        self.loader.reuse()

    def lose_worker(self, **sizes: int) -> None:
        """What it has in flight is answered by nobody. Another takes its place, which is not ready
        yet."""
        self.worker = self._new_worker(**{**self._sizes, **sizes})
        self.compiling.clear()
        self.arena_attached = False
        self.core.worker_lost(self.now)
        self.settle()

    def lose_loader(self) -> None:
        """What it was asked is answered by nobody. Another takes its place, which is not ready
        yet."""
        self.loader.start_over()
        self.core.loader_lost()
        self.settle()

    def submit(
        self,
        prompt: Sequence[int] = (1, 2, 3),
        *,
        max_tokens: int = 4,
        adapter: str | AdapterKey | None = None,
        token: str | None = None,
        ignore_eos: bool = True,
        worker: int = 0,
        logprobs: Logprobs | None = None,
        tenant: str = "",
        choices: int = 1,
        seed: int = 0,
        trace: str = "",
        grammar: str = "",
        pooling: Pooling | None = None,
        is_lost: bool = False,
    ) -> int:
        """Returns the request's number; that of its first choice."""
        request = Submit(
            request_id=len(self.requests) + 1,
            worker=worker,
            arrived=self.now,
            token_ids=array("i", prompt).tobytes(),
            max_tokens=max_tokens,
            adapter=key(adapter) if isinstance(adapter, str) else adapter,
            adapter_token=token,
            ignore_eos=ignore_eos,
            sampling=Sampling(seed=seed),
            logprobs=logprobs,
            tenant=tenant,
            choices=choices,
            trace=trace,
            grammar=grammar,
            pooling=pooling,
        )
        for request_id in request_ids(request.request_id, choices):
            self.requests[request_id] = request
            self.tokens[request_id] = []
            self.logprobs[request_id] = []
            self.prompt_logprobs[request_id] = []
        if is_lost:
            self.unheard |= {*request_ids(request.request_id, choices)}
        else:
            self.core.submit(request, self.now)
        self.settle()
        return request.request_id

    def cancel(self, request_id: int, *, is_lost: bool = False) -> None:
        """Unless it is over for its frontend, which is told on a way that may lose it."""
        if request_id in self.finished:
            return
        self.cancelled.add(request_id)
        self.unheard.discard(request_id)
        if not is_lost:
            self.core.cancel(Cancel(request_id), self.now)
        self.settle()

    def stop(self, request_id: int) -> None:
        """Its tokenizer worker has found a stop string in the last token, and ends it."""
        self.core.cancel(Cancel(request_id, stopped=True), self.now)
        self.stopped.add(request_id)
        usage = Usage(len(self.requests[request_id].token_ids) // 4, len(self.tokens[request_id]))
        self.finished[request_id] = Finished(request_id, FinishReason.STOP, usage)
        self.settle()

    def hear(self, request_id: int) -> None:
        """The end has come to its frontend."""
        self.heard.add(request_id)
        self.core.ends_heard(EndsHeard([request_id]), self.now)
        self.settle()

    def kill_tokenizer(self, worker: int) -> None:
        """Nobody knows what it knew; the frontends have what they have heard of."""
        self.dead.add(worker)
        for request_id, request in self.requests.items():
            over = request_id in self.cancelled or request_id in self.heard
            if request.worker == worker and not over:
                self.unheard.add(request_id)
                self.finished.pop(request_id, None)
                self.before[request_id] = max(
                    self.before.get(request_id, []), self.tokens[request_id], key=len
                )
                self.tokens[request_id] = []
                self.logprobs[request_id] = []
                self.prompt_logprobs[request_id] = []

    def meet_tokenizer(self, worker: int) -> None:
        """It was started again."""
        self.dead.discard(worker)
        self.core.tokenizer_started(worker)
        self.settle()

    def still_open(self, worker: int) -> None:
        """What it is going to submit again."""
        of_worker = [one for one in self.unheard if self.requests[one].worker == worker]
        self.core.still_open(StillOpen(0, worker, of_worker), self.now)
        self.settle()

    def submit_again(self, request_id: int) -> None:
        """All choices of its prompt that somebody waits for."""
        request = self.requests[request_id]
        ids = request_ids(request.request_id, request.choices)
        heard = tuple(len(self.before.get(one, [])) if one in self.unheard else GONE for one in ids)
        self.unheard -= {*ids}
        self.core.submit(msgspec.structs.replace(request, heard=heard), self.now)
        self.settle()

    def prefetch(self, adapter: str) -> None:
        self.core.prefetch(Prefetch(key(adapter)), self.now)
        self.settle()

    def stage(self, which: int = 0, *, content: str = "", nbytes: int = 512) -> None:
        self.core.adapter_staged(self.loader.stage(which, content=content, nbytes=nbytes), self.now)
        self.settle()

    def fail_load(self, which: int = 0, failure: Failure = NOT_FOUND) -> None:
        self.core.adapter_failed(self.loader.fail(which, failure), self.now)
        self.settle()

    def forget(self, which: int = 0) -> None:
        """The loader forgets what it was told to, which nobody may lease then."""
        self.core.adapter_dropped(self.loader.forget(which), self.now)
        self.settle()

    def command(
        self,
        verb: AdminVerb,
        *,
        name: str = "",
        adapter: str = "",
        pinned: bool = False,
        in_place: bool = False,
    ) -> int:
        """Returns the command's number."""
        command_id = len(self.commands) + 1
        named = key(adapter) if adapter else None
        command = AdminCommand(command_id, 0, verb, name, named, pinned=pinned, in_place=in_place)
        self.commands[command_id] = command
        self.core.admin_command(command, self.now)
        self.settle()
        return command_id

    def take_names(self) -> None:
        """Every frontend has taken the latest names."""
        for frontend, names in enumerate(self.names):
            if names.version:
                self.core.aliases_taken(AliasesTaken(names.version, frontend))
        self.settle()

    def list_adapters(self) -> dict[str, AdapterDescription]:
        """What is listed, by id."""
        self.core.list_adapters(ListAdapters(1, 0), self.now)
        self.settle()
        return self.listed

    def compile(self, error: str = "") -> None:
        """The worker has compiled the oldest grammar that it was asked for, or could not."""
        asked = self.compiling.pop(0)
        if not error:
            self.worker.compiled.add(asked.grammar_id)
        self.core.grammar_compiled(GrammarCompiled(asked.grammar_id, error), self.now)
        self.settle()

    def arrive(self) -> None:
        """The oldest copy has arrived in the pool."""
        self.core.adapter_placed(self.worker.placed())
        self.settle()

    def step(self, *, arrivals: bool = True) -> Step:
        """The worker runs the oldest step in flight, which is returned, after copies arrived."""
        while arrivals and self.worker.placing:
            self.arrive()
        done = self.worker.run()
        self.core.step_done(done, self.now)
        self.settle()
        return self.worker.run_steps[-1]

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)
        self.settle()

    def run(self) -> None:
        """Go on until nothing is left to do; loads that are pending succeed."""
        for _ in range(5000):
            if self.loader.loads:
                self.stage()
            elif self.loader.forgets:
                self.forget()
            elif self.compiling:
                self.compile()
            elif self.worker.steps:
                self.step()
            elif self.worker.placing:
                self.arrive()
            else:
                assert self.core.idle, "a request waits for ever"
                return
        raise AssertionError("no end in sight")

    # --- what follows ---

    def settle(self) -> None:
        """Send what the core says, as the loop does."""
        self._deliver()
        while (work := self.core.next_work(self.now)) is not None:
            if isinstance(work, Step):
                self.worker.send(work)
            else:
                assert self.arena_attached
                self.worker.place(work)
        self._deliver()

    def _deliver(self) -> None:
        envelopes = self.core.take_outbox()
        self.sent += envelopes
        for process, index, message in envelopes:
            match message:
                case LoadAdapter() | Leased() | ReleaseAdapter() | ForgetAdapter():
                    assert process == "adapter_loader"
                    self._to_loader.send(message)
                case CompileGrammar():
                    assert process == "gpu_worker"
                    self.worker.compiled -= {*message.forget}
                    self.compiling.append(message)
                case Aliases() | AdminDone() | AdapterList():
                    assert process == "frontend"
                    self._tell_frontend(message, index)
                case AttachArena():
                    assert process == "gpu_worker"
                    self.arena_attached = True
                case Spans():
                    assert (process, index) == ("frontend", 0)
                    self.spans += message.spans
                case Tokens() | PromptLogprobs() | Resumed() if index in self.dead:
                    pass  # who is started again does not get it
                case Tokens():
                    assert process == "tokenizer_workers"
                    self._read(message, index)
                case Resumed():
                    self._resume(message, index)
                case PromptLogprobs():
                    self._check_open(message.request_id, index)
                    assert not self.tokens[message.request_id], "the prompt comes first"
                    self.prompt_logprobs[message.request_id] += message.rows
                case _:
                    raise AssertionError(message)

    def _tell_frontend(self, message: Aliases | AdminDone | AdapterList, index: int) -> None:
        match message:
            case Aliases():
                assert message.version > self.names[index].version
                self.names[index] = message
            case AdminDone():
                assert message.command_id in self.commands
                assert message.command_id not in self.done, "it is done already"
                self.done[message.command_id] = message.failure
            case AdapterList():
                self.listed = {one.adapter.id: one for one in message.adapters}

    def _read(self, message: Tokens, worker: int) -> None:
        ids = zip(message.request_ids, message.token_ids, strict=True)
        for at, (request_id, token) in enumerate(ids):
            self._check_open(request_id, worker)
            self.tokens[request_id].append(token)
            if at in message.logprobs:
                self.logprobs[request_id].append(message.logprobs[at])
        for end in message.finished:
            self._check_open(end.request_id, worker)
            self.finished[end.request_id] = end

    def _resume(self, message: Resumed, worker: int) -> None:
        """All of it, from the beginning; what was said before is said again."""
        request_id = message.request_id
        self._check_open(request_id, worker)
        assert not self.tokens[request_id]
        tokens = array("i", message.token_ids).tolist()
        before = self.before.pop(request_id, [])
        assert tokens[: len(before)] == before
        self.tokens[request_id] = tokens
        self.logprobs[request_id] = message.logprobs
        self.prompt_logprobs[request_id] = message.prompt_logprobs
        if message.finished is not None:
            self.finished[request_id] = message.finished

    def _check_open(self, request_id: int, worker: int) -> None:
        assert request_id not in self.finished, "it has ended before"
        assert request_id not in self.unheard, "its worker does not know it"
        assert request_id not in self.cancelled
        assert self.requests[request_id].worker == worker

    def to_loader(self) -> list[object]:
        return [message for process, _, message in self.sent if process == "adapter_loader"]
