"""`python -m adapter_loader`: the sockets, threads and clock around the core."""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, assert_never

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars

from adapter_loader.checkpoint import DTYPES, BaseModel
from adapter_loader.core import Answer, Core, Discard, StartFetch, StartPack
from adapter_loader.enabled_sources import enabled_sources
from adapter_loader.loading import (
    Checked,
    Unchanged,
    fetch_and_check,
    guarded,
    pack_checked,
    texts_or_failure,
)
from adapter_loader.metrics import LOADS, ArenaCollector
from adapter_loader.packing_processes import Nursery, PackingProcesses
from adapter_loader.refusals import failure, invalid
from adapter_loader.sources import Source
from adapter_loader.text_questions import StartTexts, TextQuestions
from adapter_loader.texts import Texts
from adapter_loader.traces import LoadTraces
from adapter_loader.workers import Workers
from pipeline.arena import arena_path, create, remove_arena
from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    ArenaReady,
    AskTexts,
    Failure,
    ForgetAdapter,
    Leased,
    LoadAdapter,
    PeerStarted,
    ProcessReady,
    ReleaseAdapter,
    Shutdown,
    Spans,
    Stats,
    ToAdapterLoader,
)
from pipeline.metrics import REGISTRY, snapshot
from pipeline.model_config import read_model_config
from pipeline.model_folder import model_folder
from pipeline.process import run, run_folder

PROCESS = "adapter_loader"

T = TypeVar("T")
log = logging.getLogger(__name__)


class Loader:
    """The loop. Runs in one thread; jobs run in others, and report back into the loop."""

    def __init__(
        self,
        *,
        settings: Settings,
        base: BaseModel,
        sources: Mapping[str, Source],
        packing: PackingProcesses,
        inbox: Inbox[ToAdapterLoader],
        outbox: Outbox,
        incarnation: Incarnation,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        nbytes = settings.arena_bytes
        self._arena_ready = ArenaReady(str(arena_path(settings.run_folder())), nbytes)
        self._ready = ProcessReady(PROCESS, incarnation.index, {"arena_bytes": nbytes})
        self._base = base
        self._sources = sources
        self._packing = packing
        self._inbox = inbox
        self._outbox = outbox
        self._core = Core(
            arena_bytes=settings.arena_bytes,
            load_seconds=settings.adapter_load_seconds,
            remember_seconds=settings.failed_load_seconds,
        )
        self._texts = TextQuestions(
            workers=settings.tokenizer_workers, remember_seconds=settings.failed_load_seconds
        )
        REGISTRY.register(ArenaCollector(self._core))
        self._traces = LoadTraces()
        self._checked: dict[AdapterKey, Checked] = {}
        self._fetchers: dict[str, Workers] = {}  # by lane: a slow server holds up its own alone
        self._packers = Workers("pack", packing.count)
        self._loop = asyncio.new_event_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self._broken: BaseException | None = None

    def run(self) -> None:
        """Return when Shutdown has come; what a callback raises is raised here."""
        self._loop.set_exception_handler(self._stop_broken)
        self._inbox.watch(self._loop, self._on_message)
        self._report_stats()
        self._beat()
        try:
            self._loop.run_forever()
        finally:
            self._packers.close()
            self._packing.close()
            self._loop.close()
        if self._broken is not None:
            raise self._broken

    def _on_message(self, message: ToAdapterLoader) -> None:
        match message:
            case LoadAdapter():
                self._traces.asked(message, time.monotonic())
                self._core.load(message, self._loop.time())
            case ReleaseAdapter():
                if not self._core.release(message):
                    log.warning("event=unknown_lease adapter=%a", message.adapter.id)
            case ForgetAdapter():
                self._core.forget(message)
                self._texts.forget(message.adapter)
            case AskTexts():
                self._texts.ask(message, self._loop.time())
            case Leased():
                self._core.leased(message)
            case PeerStarted():
                self._peer_started(message)
            case Shutdown():
                self._loop.stop()
                return
            case _:
                assert_never(message)
        self._act()

    def _peer_started(self, message: PeerStarted) -> None:
        """Another scheduler has nothing of what its predecessor had; others are told who we are."""
        if not message.again:
            return  # what it is to know has waited for it
        if message.process == "scheduler":
            self._core.start_over()
            self._outbox.send("scheduler", self._arena_ready)
        elif message.process == "frontend":
            self._outbox.send("frontend", self._ready, message.index)

    def announce(self) -> None:
        """Loads may come."""
        self._outbox.greet("scheduler")
        self._outbox.greet("tokenizer_workers", self._settings.tokenizer_workers)
        self._outbox.greet("frontend", self._settings.frontends)
        self._outbox.send("scheduler", self._arena_ready)
        for frontend in range(self._settings.frontends):
            self._outbox.send("frontend", self._ready, frontend)

    def _act(self) -> None:
        """Do what the core says, and wake it when its next deadline passes."""
        for action in self._core.take_actions():
            match action:
                case StartFetch():
                    self._start_fetch(action)
                case StartPack():
                    self._start_pack(action)
                case Discard():
                    self._checked.pop(action.key).close()
                case _:
                    assert_never(action)
        for answer in self._core.take_outbox():
            self._send(answer)
        self._act_on_texts()
        if self._deadline is not None:
            self._deadline.cancel()
        deadline = self._core.next_deadline()
        self._deadline = None if deadline is None else self._loop.call_at(deadline, self._expire)

    def _start_fetch(self, action: StartFetch) -> None:
        key = action.key
        origin = key.parts[0]  # the parts of a merge have one source
        source = self._sources.get(origin.source)
        if source is None:
            error = invalid(f"the source {origin.source} is not one of {', '.join(self._sources)}")
            self._loop.call_soon(self._on_fetched, key, failure(key, error))
            return
        fetch = partial(fetch_and_check, key, action.token, action.known, source, self._base)
        lane = self._lane(source.lane(origin))
        lane.submit(partial(self._run_job, key, fetch, self._on_fetched))

    def _act_on_texts(self) -> None:
        for action in self._texts.take_actions():
            source = self._sources.get(action.key.source)
            lane = action.key.source if source is None else source.lane(action.key)
            self._lane(f"texts of {lane}").submit(partial(self._read_texts, action, source))
        for to in self._texts.take_outbox():
            self._outbox.send("tokenizer_workers", to.message, to.worker)

    def _read_texts(self, action: StartTexts, source: Source | None) -> None:
        """In a worker thread."""
        result = texts_or_failure(action.key, action.token, action.known, source)
        try:
            self._loop.call_soon_threadsafe(self._on_texts, action, result)
        except RuntimeError:
            log.info("event=texts_abandoned adapter=%a", action.key.id)  # the loop is closed

    def _on_texts(self, action: StartTexts, result: Texts | Failure | None) -> None:
        if isinstance(result, Failure):
            log.info("event=texts_failed adapter=%a reason=%a", action.key.id, result.message)
            self._texts.failed(action.number, result, self._loop.time())
        else:
            self._texts.fetched(action.number, result)
        self._act_on_texts()

    def _lane(self, name: str) -> Workers:
        """Its threads, made when it is first used."""
        if name not in self._fetchers:
            self._fetchers[name] = Workers(f"fetch-{name}", self._settings.loader_threads)
        return self._fetchers[name]

    def _start_pack(self, action: StartPack) -> None:
        into = partial(self._packing.pack, offset=action.offset)
        pack = partial(pack_checked, self._checked.pop(action.key), into)
        self._packers.submit(partial(self._run_job, action.key, pack, self._on_packed))

    def _run_job(
        self,
        key: AdapterKey,
        job: Callable[[], T],
        report: Callable[[AdapterKey, T | Failure], None],
    ) -> None:
        """In a worker thread."""
        result = guarded(key, job)
        try:
            self._loop.call_soon_threadsafe(report, key, result)
        except RuntimeError:
            log.info("event=load_abandoned adapter=%a", key.id)  # the loop is closed

    def _on_fetched(self, key: AdapterKey, result: Checked | Unchanged | Failure) -> None:
        match result:
            case Checked():
                self._checked[key] = result
                plan = result.plan
                self._core.fetched(key, result.identity, plan.placed.nbytes, plan.ranks)
            case Unchanged():
                self._traces.unchanged(key)
                self._core.unchanged(key)
            case Failure():
                self._core.failed(key, result, self._loop.time())
            case _:
                assert_never(result)
        self._act()

    def _on_packed(self, key: AdapterKey, result: str | Failure) -> None:
        if isinstance(result, Failure):
            self._core.failed(key, result, self._loop.time())
        else:
            self._core.packed(key, result)
        self._act()

    def _expire(self) -> None:
        self._core.expire(self._loop.time())
        self._act()

    def _send(self, answer: Answer) -> None:
        spans = self._traces.answered(answer, time.monotonic())
        self._outbox.send("scheduler", answer)
        if spans:
            self._outbox.send("frontend", Spans(PROCESS, 0, spans))
        key = answer.adapter
        match answer:
            case AdapterFailed():
                kind, reason = answer.failure.kind.value, answer.failure.message
                log.warning("event=adapter_failed adapter=%a reason=%a", key.id, reason)
                LOADS.labels(key.source, kind).inc()
            case AdapterStaged():
                log.info(
                    "event=adapter_staged adapter=%a source=%s bytes=%d content=%.12s",
                    key.id,
                    key.source,
                    answer.nbytes,
                    answer.content,
                )
                LOADS.labels(key.source, "staged").inc()
            case AdapterDropped():
                log.debug("event=adapter_dropped adapter=%a source=%s", key.id, key.source)
            case _:
                assert_never(answer)

    def _report_stats(self) -> None:
        for index in range(self._settings.frontends):
            self._outbox.send("frontend", Stats(PROCESS, 0, snapshot()), index)
        self._loop.call_later(self._settings.stats_seconds, self._report_stats)

    def _beat(self) -> None:
        self._incarnation.beat()
        if self._incarnation.beat_seconds < math.inf:
            self._loop.call_later(self._incarnation.beat_seconds, self._beat)

    def _stop_broken(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._broken = context.get("exception") or RuntimeError(context["message"])
        loop.stop()


def base_model(settings: Settings) -> BaseModel:
    """What adapters have to fit. Raises ConfigError."""
    config = read_model_config(model_folder(settings))
    dtype = config.dtype if settings.dtype == "auto" else settings.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: the checkpoint's {dtype} is not supported, name another")
    return BaseModel(config.layers, config.module_shapes(), dtype)


def main(settings: Settings, incarnation: Incarnation) -> None:
    torch.set_num_threads(1)
    nursery = Nursery()  # before there are threads
    disable_progress_bars()
    folder = run_folder(settings)
    base = base_model(settings)
    sources = enabled_sources(settings)
    path = arena_path(folder)
    create(path, settings.arena_bytes)
    outbox = Outbox(folder, incarnation)
    inbox: Inbox[ToAdapterLoader] = Inbox(
        folder, PROCESS, incarnation.index, ToAdapterLoader, outbox
    )
    try:
        loader = Loader(
            settings=settings,
            base=base,
            sources=sources,
            packing=PackingProcesses(
                nursery, path, settings.arena_bytes, settings.packing_processes
            ),
            inbox=inbox,
            outbox=outbox,
            incarnation=incarnation,
        )
        loader.announce()
        gc.freeze()  # else each full collection looks at all of torch, with the lock of all threads
        loader.run()
        remove_arena(folder)  # one that dies leaves it to its successor
    finally:
        inbox.close()
        outbox.close()
        nursery.close()


if __name__ == "__main__":
    run(PROCESS, main)
