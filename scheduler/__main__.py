"""The scheduler's process: reads its inbox, tells the core, sends what the core says."""

import gc
import logging
import time
from typing import assert_never

from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterPlaced,
    AdapterStaged,
    AdminCommand,
    AliasesTaken,
    ArenaReady,
    Cancel,
    EndsHeard,
    GrammarCompiled,
    ListAdapters,
    NamesKept,
    PeerStarted,
    Prefetch,
    ProcessReady,
    Shutdown,
    Stats,
    StepDone,
    StillOpen,
    Submit,
    ToScheduler,
    WorkerReady,
)
from pipeline.metrics import REGISTRY, snapshot
from pipeline.model_config import read_model_config
from pipeline.model_folder import model_folder
from pipeline.process import run
from scheduler.core import Scheduler
from scheduler.metrics import AdaptersCollector, FiguresCollector, TimingsCollector

NAME = "scheduler"
log = logging.getLogger(__name__)


def main(settings: Settings, incarnation: Incarnation) -> None:
    gc.disable()  # a full collection over 100,000 cached blocks would stop everybody for 10 ms
    outbox = Outbox(settings.run_folder(), incarnation)
    inbox: Inbox[ToScheduler] = Inbox(
        settings.run_folder(), NAME, incarnation.index, ToScheduler, outbox
    )
    eos_token_ids = read_model_config(model_folder(settings)).eos_token_ids
    core = Scheduler(settings=settings, eos_token_ids=eos_token_ids)
    REGISTRY.register(FiguresCollector(core.figures))
    REGISTRY.register(TimingsCollector(core.timings))
    REGISTRY.register(
        AdaptersCollector(
            tier_hits=core.tier_hits, names=core.adapter_names, slots=settings.adapter_slots
        )
    )
    Loop(settings=settings, core=core, inbox=inbox, outbox=outbox, incarnation=incarnation).run()
    outbox.close()
    inbox.close()


class Loop:
    """Between the core and the sockets, until every tokenizer worker has said that it is done."""

    def __init__(
        self,
        *,
        settings: Settings,
        core: Scheduler,
        inbox: Inbox[ToScheduler],
        outbox: Outbox,
        incarnation: Incarnation,
    ) -> None:
        self._settings = settings
        self._core = core
        self._inbox = inbox
        self._outbox = outbox
        self._incarnation = incarnation
        self._feeding = set(range(settings.tokenizer_workers))  # that have not said Shutdown
        self._stats_due = time.monotonic() + settings.stats_seconds

    def run(self) -> None:
        self._greet()
        now = time.monotonic()
        while self._feeding or not self._core.idle:
            self._incarnation.beat()
            messages = self._inbox.receive(self._timeout_ms(now))
            now = time.monotonic()
            for message in messages:
                self._tell(message, now)
            self._core.tick(now)
            self._send(now)
            if now >= self._stats_due:
                self._stats_due = now + self._settings.stats_seconds
                self._to_frontends(Stats(NAME, 0, snapshot()))
                gc.collect(1)  # what is young; the core makes no cycles, libraries may
        for process in ("gpu_worker", "adapter_loader"):
            self._outbox.send(process, Shutdown(NAME))

    def _greet(self) -> None:
        """Whoever had to do with a predecessor starts over."""
        self._outbox.greet("gpu_worker")
        self._outbox.greet("adapter_loader")
        self._outbox.greet("tokenizer_workers", self._settings.tokenizer_workers)
        self._outbox.greet("frontend", self._settings.frontends)

    def _timeout_ms(self, now: float) -> int:
        deadline = self._core.next_deadline()
        due = self._stats_due if deadline is None else min(deadline, self._stats_due)
        wait = min(due - now, self._incarnation.beat_seconds)
        return max(0, int(wait * 1000) + 1)

    def _tell(self, message: ToScheduler, now: float) -> None:
        match message:
            case StepDone():
                self._core.step_done(message, now)
            case AdapterPlaced():
                self._core.adapter_placed(message)
            case GrammarCompiled():
                self._core.grammar_compiled(message, now)
            case Submit():
                self._core.submit(message, now)
            case EndsHeard():
                self._core.ends_heard(message, now)
            case StillOpen():
                self._core.still_open(message, now)
            case Cancel():
                self._core.cancel(message, now)
            case Prefetch():
                self._core.prefetch(message, now)
            case AdapterStaged():
                self._core.adapter_staged(message, now)
            case AdapterFailed():
                self._core.adapter_failed(message, now)
            case AdapterDropped():
                self._core.adapter_dropped(message, now)
            case AdminCommand():
                self._core.admin_command(message, now)
            case AliasesTaken():
                self._core.aliases_taken(message)
            case NamesKept():
                self._core.names_kept(message)
            case ListAdapters():
                self._core.list_adapters(message, now)
            case WorkerReady():
                self._core.worker_ready(message, now)
                self._announce()
            case ArenaReady():
                self._core.arena_ready(message)
                self._announce()
            case PeerStarted():
                self._peer_started(message, now)
            case Shutdown():
                self._feeding.discard(message.index)
            case _:
                assert_never(message)

    def _peer_started(self, message: PeerStarted, now: float) -> None:
        """Its predecessor is dead. Workers and loader say themselves when they are ready."""
        if not message.again:
            return  # what it is to know has waited for it
        match message.process:
            case "gpu_worker":
                self._core.worker_lost(now)
            case "adapter_loader":
                self._core.loader_lost()
            case "tokenizer_workers":
                self._core.tokenizer_started(message.index)
            case "frontend":
                self._core.frontend_started(message.index, now)
                facts = self._core.facts()
                if facts is not None:
                    self._outbox.send("frontend", ProcessReady(NAME, facts=facts), message.index)

    def _announce(self) -> None:
        facts = self._core.facts()
        if facts is not None:
            log.info("event=ready %s", " ".join(f"{name}={fact}" for name, fact in facts.items()))
            self._to_frontends(ProcessReady(NAME, facts=facts))

    def _to_frontends(self, message: ProcessReady | Stats) -> None:
        for frontend in range(self._settings.frontends):
            self._outbox.send("frontend", message, frontend)

    def _send(self, now: float) -> None:
        """What the core says; an arena is attached before the first copy out of it."""
        self._empty_outbox()
        while (work := self._core.next_work(now)) is not None:
            self._outbox.send("gpu_worker", work)
        self._empty_outbox()

    def _empty_outbox(self) -> None:
        for process, index, message in self._core.take_outbox():
            self._outbox.send(process, message, index)


if __name__ == "__main__":
    run(NAME, main)
