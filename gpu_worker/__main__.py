"""The process: reads steps from its inbox, runs them, sends what they gave.

Waits for the disk only before it is ready; the arena that it maps later is shared memory.
"""

import os
import time
from collections import deque
from pathlib import Path
from typing import assert_never

from gpu_worker.build import build_worker
from gpu_worker.figures import Figures
from gpu_worker.prefill_traces import PrefillTraces
from gpu_worker.worker import Launched
from pipeline.arena import attach
from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterPlaced,
    AttachArena,
    CompileGrammar,
    PeerStarted,
    PlaceAdapter,
    ProcessReady,
    Shutdown,
    Spans,
    Stats,
    Step,
    ToGpuWorker,
)
from pipeline.metrics import snapshot
from pipeline.model_folder import model_folder
from pipeline.process import run

NAME = "gpu_worker"
POLL_SECONDS = 20e-6  # between two looks at a device that is busy
COMPILING_MS = 1  # between two looks at whether a grammar is compiled
COPY_SHARE = 0.03  # of a step's time, for adapters that this thread copies between steps


def main(settings: Settings, incarnation: Incarnation) -> None:
    outbox = Outbox(settings.run_folder(), incarnation)
    inbox = Inbox[ToGpuWorker](settings.run_folder(), NAME, incarnation.index, ToGpuWorker, outbox)
    try:
        Process(settings, incarnation, inbox, outbox).run()
    finally:
        outbox.close()
        inbox.close()


class Process:
    """The worker between its sockets."""

    def __init__(
        self,
        settings: Settings,
        incarnation: Incarnation,
        inbox: Inbox[ToGpuWorker],
        outbox: Outbox,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._index = index = incarnation.index
        self._inbox = inbox
        self._outbox = outbox
        self._launched: deque[Launched] = deque()
        self._prefills = PrefillTraces()
        outbox.greet("scheduler")
        outbox.greet("frontend", settings.frontends)
        self._arena: tuple[int, int] | None = None  # the file that is attached
        self._built = build_worker(settings, model_folder(settings), Figures(), index)
        self._worker = self._built.worker
        self._ready = ProcessReady(NAME, index, self._built.facts)
        outbox.send("scheduler", self._built.ready)
        self._to_frontends(self._ready)

    def run(self) -> None:
        """Until the scheduler says that no step will follow."""
        stats_due = time.monotonic()
        self._incarnation.beat()
        while True:
            now = time.monotonic()
            if now >= stats_due:
                self._to_frontends(Stats(NAME, self._index, snapshot()))
                stats_due = now + self._settings.stats_seconds
            wait = min(stats_due - now, self._incarnation.beat_seconds)
            wait_ms = 0 if self._is_busy else int(wait * 1000) + 1
            if self._worker.grammars.is_compiling:
                wait_ms = min(wait_ms, COMPILING_MS)
            messages = self._inbox.receive(wait_ms)
            sampled = self._worker.sample_launched()
            went_on = not messages and self._worker.advance(0)
            for message in messages:
                match message:
                    case Step():
                        self._step(message)
                    case CompileGrammar():
                        self._worker.grammars.compile(message)
                    case PlaceAdapter():
                        self._worker.place(message)
                    case AttachArena():
                        self._attach(message)
                    case PeerStarted():
                        self._peer_started(message)
                    case Shutdown():
                        return
                    case _:
                        assert_never(message)
            placed, done = self._send_placed(), self._send_done()
            self._send_compiled()
            if done or not self._launched:  # else the device may hang, and we with it
                self._incarnation.beat()
            if not (placed or done or messages or went_on or sampled) and self._is_busy:
                time.sleep(POLL_SECONDS)

    def _attach(self, message: AttachArena) -> None:
        """A loader that was started again has taken over the file that its predecessor made."""
        status = os.stat(message.path)
        if self._arena != (status.st_dev, status.st_ino):
            self._worker.attach_arena(attach(Path(message.path), message.nbytes))
            self._arena = (status.st_dev, status.st_ino)

    def _peer_started(self, message: PeerStarted) -> None:
        """Another scheduler knows nothing of what is here, and frontends not what it is."""
        if not message.again:
            return  # what it is to know has waited for it
        if message.process == "scheduler":
            self._launched.clear()
            self._prefills = PrefillTraces()
            self._worker.start_over(self._built.new_grammars())
            self._outbox.send("scheduler", self._built.ready)
        elif message.process == "frontend":
            self._outbox.send("frontend", self._ready, message.index)

    def _step(self, message: Step) -> None:
        """Launch it. On a CPU it is over then: its tokens go out, and adapters get their share of
        the time, before the next step that has come already."""
        start = time.monotonic()
        self._prefills.launched(message, start)
        self._launched.append(self._worker.launch(message))
        self._send_placed()
        self._send_done()
        self._worker.advance(COPY_SHARE * (time.monotonic() - start))

    @property
    def _is_busy(self) -> bool:
        return bool(self._launched) or self._worker.adapters.is_placing

    def _send_placed(self) -> bool:
        """The adapters that have arrived, in order. Returns whether there was one."""
        slots = self._worker.placed()
        for slot in slots:
            self._outbox.send("scheduler", AdapterPlaced(slot, index=self._index))
        return bool(slots)

    def _send_compiled(self) -> None:
        for answer in self._worker.grammars.compiled():
            self._outbox.send("scheduler", answer)

    def _send_done(self) -> bool:
        """The steps that have ended, in order. Returns whether there was one."""
        sent = False
        while self._launched and self._launched[0].is_done:
            launched = self._launched.popleft()
            done = launched.result()
            self._outbox.send("scheduler", done)
            self._worker.count(launched)
            spans = self._prefills.done(done.step_id, time.monotonic())
            if spans:
                self._outbox.send("frontend", Spans(NAME, self._index, spans))
            sent = True
        return sent

    def _to_frontends(self, message: ProcessReady | Stats) -> None:
        for frontend in range(self._settings.frontends):
            self._outbox.send("frontend", message, frontend)


if __name__ == "__main__":
    run(NAME, main)
