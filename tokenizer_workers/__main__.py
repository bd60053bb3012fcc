"""The loop of a tokenizer worker: read, tell the core, send what it says."""

import hashlib
import time
from functools import partial
from typing import assert_never

from prometheus_client import Counter, Gauge, Histogram

from pipeline.channels import Inbox, Outbox
from pipeline.config import Settings
from pipeline.incarnation import Incarnation
from pipeline.messages import (
    AdapterTexts,
    Cancel,
    ForgetTexts,
    GrammarChecked,
    PeerStarted,
    ProcessReady,
    Prompt,
    PromptLogprobs,
    Rendered,
    Resumed,
    Shutdown,
    Span,
    Spans,
    Stats,
    StillOpen,
    Tokenize,
    TokenizerCompared,
    Tokens,
    ToTokenizerWorker,
)
from pipeline.metrics import REGISTRY, snapshot
from pipeline.process import run
from tokenizer_workers.comparisons import Comparisons
from tokenizer_workers.core import PROCESS, Core
from tokenizer_workers.grammar_checks import GrammarChecks
from tokenizer_workers.known_texts import TOKENIZER_FILE, KnownTexts
from tokenizer_workers.loading import TextModel, load
from tokenizer_workers.own_texts import read_own_texts
from tokenizer_workers.strange_templates import StrangeTemplates

ENCODE_SECONDS = Histogram(
    "loradex_encode_seconds", "Time to encode a prompt, template included", registry=REGISTRY
)
TOKENS = Counter("loradex_decoded_tokens", "Tokens that became text", registry=REGISTRY)
OPEN_REQUESTS = Gauge(
    "loradex_tokenizer_open_requests", "Requests between prompt and end", registry=REGISTRY
)


def main(settings: Settings, incarnation: Incarnation) -> None:
    model = load(settings)
    worker = Worker(settings, incarnation, model)
    worker.announce()
    while worker.core.frontends:
        worker.turn()
    worker.close()


class Worker:
    """A core and its sockets."""

    def __init__(self, settings: Settings, incarnation: Incarnation, model: TextModel) -> None:
        self._incarnation = incarnation
        self._index = index = incarnation.index
        self._stats_seconds = settings.stats_seconds
        self._next_stats = time.monotonic()
        facts: dict[str, str | int | float | None] = {"max_total_tokens": model.max_total_tokens}
        self._ready = ProcessReady(PROCESS, index, facts)
        run_dir = settings.run_folder()
        self._outbox = Outbox(run_dir, incarnation)
        self._inbox: Inbox[ToTokenizerWorker] = Inbox(
            run_dir, PROCESS, index, ToTokenizerWorker, self._outbox
        )
        self._tokenized = model.encoder.tokenized
        self.core = Core(
            worker=index,
            frontends=settings.frontends,
            encode=model.encoder.encode,
            new_decoder=model.new_decoder,
            new_token_decoder=model.new_token_decoder,
            vocabulary=model.vocabulary,
            new_tool_decoder=model.new_tool_decoder,
            texts=_known_texts(settings, index, model) if settings.adapter_chat_templates else None,
        )
        self._comparisons = Comparisons(settings, PROCESS, index, model.folder)
        self._templates = StrangeTemplates(
            settings, PROCESS, index, model.template_limits, self.core.renders
        )
        self._checks = GrammarChecks(settings, PROCESS, index, model.compiler)

    def announce(self) -> None:
        self._outbox.greet("scheduler")
        self._outbox.greet("adapter_loader")
        self._outbox.greet("frontend", len(self.core.frontends))
        for frontend in self.core.frontends:
            self._say_ready(frontend)

    def _say_ready(self, frontend: int) -> None:
        self._outbox.send("frontend", self._ready, frontend)

    def turn(self) -> None:
        """Deal with what has arrived, or wait for it until the next report is due."""
        self._incarnation.beat()
        wait = max(0.0, self._next_stats - time.monotonic())
        wait = min(wait, self._incarnation.beat_seconds)
        for message in self._inbox.receive(timeout_ms=int(wait * 1000) + 1):
            if isinstance(message, Prompt):
                self._send()  # nobody waits for the text of others to be encoded
            self._tell(message)
            self._incarnation.beat()
        self.core.expire(time.monotonic())
        self._go_on()
        self._send()
        if time.monotonic() >= self._next_stats:
            self._report()

    def close(self) -> None:
        self._templates.close()
        self._checks.close()
        self._outbox.close()
        self._inbox.close()

    def _tell(self, message: ToTokenizerWorker) -> None:
        match message:
            case Tokens():
                self.core.tokens(message, time.monotonic())
                TOKENS.inc(len(message.token_ids))
            case Prompt():
                started = time.monotonic()
                with ENCODE_SECONDS.time():
                    self.core.prompt(message, started)
                if not self.core.waits(message.request_id):
                    self._trace(message, started)
            case AdapterTexts() | ForgetTexts() | TokenizerCompared():
                self.core.texts_told(message, time.monotonic())
                self._go_on()
            case PromptLogprobs():
                self.core.prompt_logprobs(message)
            case Resumed():
                self.core.resumed(message, time.monotonic())
            case Tokenize():
                self._outbox.send("frontend", self._tokenized(message), message.frontend)
            case Rendered():
                prompt = self.core.rendered(message, time.monotonic())
                if prompt is not None:
                    self._trace(prompt, prompt.arrived)
            case GrammarChecked():
                self.core.grammar_checked(message, time.monotonic())
            case Cancel():
                self.core.cancel(message.request_id)
            case StillOpen():
                self.core.still_open(message)
            case PeerStarted():
                self._peer_started(message)
            case Shutdown():
                self.core.shutdown(message.index)
            case _:
                assert_never(message)

    def _peer_started(self, message: PeerStarted) -> None:
        if not message.again:
            return  # what it is to know has waited for it
        if message.process == "scheduler":
            self.core.scheduler_started(time.monotonic())
        elif message.process == "adapter_loader":
            self.core.loader_started(time.monotonic())
        elif message.process == "frontend":
            self.core.frontend_started(message.index)
            self._say_ready(message.index)

    def _go_on(self) -> None:
        """With the prompts whose adapters' texts have come."""
        while self.core.is_ready:
            self._send()  # as before any other prompt
            with ENCODE_SECONDS.time():
                prompt = self.core.go_on(time.monotonic())
            if not self.core.renders(prompt.request_id):
                self._trace(prompt, prompt.arrived)

    def _trace(self, prompt: Prompt, started: float) -> None:
        """It has been encoded, or it cannot be."""
        if prompt.trace:
            span = Span(prompt.trace, "tokenise", started, time.monotonic())
            self._outbox.send("frontend", Spans(PROCESS, self._index, (span,)))

    def _send(self) -> None:
        for question in self.core.take_questions():
            self._outbox.send("adapter_loader", question)
        for one in self.core.take_comparisons():
            self._comparisons.compare(one)
        for chat in self.core.take_renderings():
            self._templates.render(chat)
        for source in self.core.take_checks():
            self._checks.check(source)
        for to in self.core.take_outbox():
            self._outbox.send(to.process, to.message, to.index)

    def _report(self) -> None:
        self._next_stats = time.monotonic() + self._stats_seconds
        OPEN_REQUESTS.set(self.core.requests)
        families = snapshot(REGISTRY)
        for frontend in self.core.frontends:
            self._outbox.send("frontend", Stats(PROCESS, self._index, families), frontend)


def _known_texts(settings: Settings, index: int, model: TextModel) -> KnownTexts:
    tokenizer = (model.folder / TOKENIZER_FILE).read_bytes()
    return KnownTexts(
        worker=index,
        read=partial(read_own_texts, base=model.base_texts),
        base_tokenizer=hashlib.sha256(tokenizer).hexdigest(),
        revalidate_seconds=settings.adapter_revalidate_seconds,
        wait_seconds=settings.adapter_load_seconds,
    )


if __name__ == "__main__":
    run(PROCESS, main)
