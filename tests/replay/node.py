"""Frontend, tokenizer workers and scheduler as their cores, with every message between them in the
hands of a test, and workers that die between any two of them.

The channels are those of pipeline.channels: order is kept on each connection and nowhere else, a
message says which incarnation has sent it and which it is for, and whoever starts greets. What a
worker had not read when it died is lost from the front: the rest reaches its successor.
"""

import random
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec

from frontend.downstream import Downstream, Reply
from pipeline.config import Settings
from pipeline.messages import (
    ArenaReady,
    Cancel,
    CompileGrammar,
    EndsHeard,
    GrammarChecked,
    GrammarCompiled,
    Message,
    Pieces,
    Prompt,
    PromptDetails,
    PromptLogprobs,
    Rendered,
    Resumed,
    Step,
    StillOpen,
    Submit,
    Tokens,
)
from scheduler.core import Scheduler
from tests.scheduler.fake_worker import EOS, VOCABULARY, FakeWorker
from tokenizer_workers.core import Core
from tokenizer_workers.details import Vocabulary
from tokenizer_workers.encode import Encoded

TEXTS = ("", *"abcdefABC#", "ab", "#a", " ", "fe", "D", "c d")
assert len(TEXTS) == VOCABULARY
SETTINGS = Settings(rows=6, step_tokens=24, model_id="base", adapter_root=())

Place = tuple[str, int]
FRONTEND, SCHEDULER = ("frontend", 0), ("scheduler", 0)


class Texts:
    """A decoder; a text that ends in an upper case letter waits for the next one."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._held + TEXTS[token_id]
        self._held = text if text[-1:].isupper() else ""
        return "" if self._held else text

    def finish(self) -> str:
        return self._held


def encode(prompt: Prompt) -> Encoded:
    ids = array("i", [1 + ord(letter) % (VOCABULARY - 1) for letter in prompt.text or ""])
    grammar = prompt.grammar.text if prompt.grammar else ""
    return Encoded(ids.tobytes(), len(ids), prompt.max_tokens or 1, grammar)


class Sent(NamedTuple):
    sender: int  # incarnations
    receiver: int  # 0: for whichever there is
    message: Message | None  # None is a greeting


class Node:
    """All of it.

    choose   what happens next
    workers  tokenizer workers
    """

    def __init__(self, choose: random.Random, *, workers: int) -> None:
        self._choose = choose
        self._now = 0.0
        settings = msgspec.structs.replace(SETTINGS, tokenizer_workers=workers)
        sizes = {"rows": settings.rows, "kv_blocks": 64, "step_tokens": 24, "chunk_tokens": 24}
        self.gpu = FakeWorker(arena={}, **sizes)
        self.scheduler = Scheduler(settings=settings, eos_token_ids=(EOS,))
        self.scheduler.worker_ready(self.gpu.ready, self._now)
        self.scheduler.arena_ready(ArenaReady("arena", 1))
        self.frontend = Downstream(settings, 0, self._from_frontend)
        self.workers = {("tokenizer_workers", index): self._core(index) for index in range(workers)}
        places = (FRONTEND, SCHEDULER, *self.workers)
        self._incarnation = dict.fromkeys(places, 1)
        self._known = {place: dict.fromkeys(places, 1) for place in places}
        self._queues: dict[tuple[Place, int, Place], deque[Sent]] = {}
        self._waiting: dict[tuple[Place, Place], list[Message]] = {}  # for those not heard of
        self._beside: dict[Place, list[Message]] = {place: [] for place in self.workers}
        self._clients = ExitStack()
        self.deaths = 0
        self.repeated = 0  # prompts
        self._settle()

    # --- what may happen ---

    def ask(self, prompt: Prompt) -> Reply:
        return self._clients.enter_context(self.frontend.start(prompt, streamed=True))

    def leave(self) -> None:
        """All clients go."""
        self._clients.close()

    def go_on(self) -> bool:
        """One thing happens; False when there is nothing left to do."""
        self._now += 0.001
        queues = [key for key, queue in self._queues.items() if queue]
        beside = [place for place, messages in self._beside.items() if messages]
        possible: list[Any] = [*queues, *beside, *(["step"] if self.gpu.steps else [])]
        if not possible:
            return False
        one = self._choose.choice(possible)
        if one == "step":
            self.scheduler.step_done(self.gpu.run(), self._now)
            self._settle()
        elif one in self.workers:
            answers = self._beside[one]
            self._tell_worker(one, answers.pop(self._choose.randrange(len(answers))))
        else:
            self._deliver(*one)
        return True

    def kill(self, place: Place) -> None:
        """Some of what it has sent arrives, and some of what it was sent reaches its successor."""
        for (sender, _, receiver), queue in self._queues.items():
            if place == sender:
                for _ in range(self._choose.randrange(len(queue) + 1)):
                    queue.pop()
            elif place == receiver:
                for _ in range(self._choose.randrange(len(queue) + 1)):
                    queue.popleft()
        self.deaths += 1
        self._incarnation[place] += 1
        self._known[place] = {}
        self._waiting = {ends: held for ends, held in self._waiting.items() if ends[0] != place}
        self._beside[place] = []
        self.workers[place] = self._core(place[1])
        for peer in (FRONTEND, SCHEDULER):
            self._put(place, peer, None)

    def is_ending(self, place: Place) -> bool:
        """Whether the end of a request is on its way from there."""
        queue = self._queues.get((place, self._incarnation[place], FRONTEND), ())
        return any(isinstance(sent.message, Pieces) and sent.message.ends for sent in queue)

    # --- channels ---

    def _send(self, sender: Place, receiver: Place, message: Message) -> None:
        if receiver in self._known[sender]:
            self._put(sender, receiver, message)
        else:
            self._waiting.setdefault((sender, receiver), []).append(message)

    def _put(self, sender: Place, receiver: Place, message: Message | None) -> None:
        incarnation = self._incarnation[sender]
        sent = Sent(incarnation, self._known[sender].get(receiver, 0), message)
        self._queues.setdefault((sender, incarnation, receiver), deque()).append(sent)

    def _deliver(self, sender: Place, incarnation: int, receiver: Place) -> None:
        sent = self._queues[sender, incarnation, receiver].popleft()
        known = self._known[receiver].get(sender, 0)
        if sent.sender < known:
            return
        if sent.sender > known:
            self._known[receiver][sender] = sent.sender
            self._put(receiver, sender, None)
            for message in self._waiting.pop((receiver, sender), ()):
                self._put(receiver, sender, message)
            if known:
                self._peer_started(receiver, sender)
        if sent.message is not None and sent.receiver in (0, self._incarnation[receiver]):
            self._tell(receiver, sent.message)

    # --- processes ---

    def _core(self, index: int) -> Core:
        return Core(
            worker=index,
            frontends=1,
            encode=encode,
            new_decoder=Texts,
            new_token_decoder=Texts,
            vocabulary=Vocabulary(lambda token: TEXTS[token].encode(), frozenset({EOS})),
            new_tool_decoder=Texts,
        )

    def _from_frontend(self, process: str, message: Message, index: int) -> None:
        if isinstance(message, Prompt) and message.heard is not None:
            self.repeated += 1
        self._send(FRONTEND, (process, index), message)

    def _peer_started(self, receiver: Place, sender: Place) -> None:
        if receiver == FRONTEND:
            self.frontend.worker_started(sender[1])
        elif receiver == SCHEDULER:
            self.scheduler.tokenizer_started(sender[1])

    def _tell(self, receiver: Place, message: Message) -> None:
        if receiver == FRONTEND:
            if isinstance(message, PromptDetails):
                self.frontend.tell_prompt(message)
            else:
                assert isinstance(message, Pieces)
                self.frontend.deliver(message)
        elif receiver == SCHEDULER:
            self._tell_scheduler(message)
        else:
            self._tell_worker(receiver, message)

    def _tell_scheduler(self, message: Message) -> None:
        match message:
            case Submit():
                self.scheduler.submit(message, self._now)
            case Cancel():
                self.scheduler.cancel(message, self._now)
            case StillOpen():
                self.scheduler.still_open(message, self._now)
            case EndsHeard():
                self.scheduler.ends_heard(message, self._now)
            case _:
                raise AssertionError(message)
        self._settle()

    def _settle(self) -> None:
        """As the scheduler's loop does."""
        outbox = self.scheduler.take_outbox()
        while (work := self.scheduler.next_work(self._now)) is not None:
            assert isinstance(work, Step)
            self.gpu.send(work)
        for process, index, message in outbox + self.scheduler.take_outbox():
            if process == "tokenizer_workers":
                self._send(SCHEDULER, (process, index), message)
            elif isinstance(message, CompileGrammar):
                self.gpu.compiled.add(message.grammar_id)
                self.scheduler.grammar_compiled(GrammarCompiled(message.grammar_id), self._now)
                self._settle()

    def _tell_worker(self, place: Place, message: Message) -> None:
        core = self.workers[place]
        match message:
            case Prompt():
                core.prompt(message, self._now)
            case Rendered():
                core.rendered(message, self._now)
            case GrammarChecked():
                core.grammar_checked(message, self._now)
            case Cancel():
                core.cancel(message.request_id)
            case StillOpen():
                core.still_open(message)
            case Tokens():
                core.tokens(message, self._now)
            case PromptLogprobs():
                core.prompt_logprobs(message)
            case Resumed():
                core.resumed(message, self._now)
            case _:
                raise AssertionError(message)
        for asked in core.take_renderings():
            content = (asked.prompt.chat or [])[0]["content"]
            self._beside[place].append(Rendered(asked.prompt.request_id, content))
        for source in core.take_checks():
            self._beside[place].append(GrammarChecked(source, "bad" if source == "bad" else ""))
        if self._choose.random() < 0.7:  # else more is read before anything is sent
            self.flush(place)

    def flush(self, place: Place) -> None:
        for to in self.workers[place].take_outbox():
            self._send(place, (to.process, to.index), to.message)


class Said(NamedTuple):
    """What a client sees of a choice."""

    text: str
    tokens: Sequence[Any]
    prompt: PromptDetails | None
    reason: str
    failure: str
    prompt_tokens: int
    completion_tokens: int


async def said(reply: Reply) -> list[Said]:
    """All of it, once it has ended."""
    seen = []
    for stream in reply.streams:
        pieces, end = stream.take()
        assert end is not None, f"request {stream.request_id} has not ended"
        details = stream.prompt
        seen.append(
            Said(
                "".join(piece.text for piece in pieces),
                [token for piece in pieces for token in piece.tokens],
                details and PromptDetails(0, details.text, details.tokens),
                end.reason,
                "" if end.failure is None else end.failure.message,
                end.usage.prompt_tokens,
                end.usage.completion_tokens,
            )
        )
    return seen
