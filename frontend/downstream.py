"""Sends requests on their way, and hands each task what comes back for its request."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice

import msgspec

from frontend import deadlines, metrics
from frontend.admission import Admission
from frontend.aliases import Aliases
from frontend.calls import Part
from frontend.deadlines import Deadline
from frontend.exchange import ClientGone
from frontend.open_prompts import OpenPrompts
from frontend.questions import Questions
from frontend.streams import Stream, Streams
from pipeline.choices import request_ids
from pipeline.config import Settings
from pipeline.messages import (
    REQUEST_BITS,
    AliasesTaken,
    Cancel,
    EndsHeard,
    Failure,
    FailureKind,
    Message,
    Pieces,
    Prefetch,
    Prompt,
    PromptDetails,
    Shutdown,
    StillOpen,
    Tokenized,
)

KEEP_ALIVE_SECONDS = 15.0
LAST_WORDS_SECONDS = 1.0  # to send the ends of what the drain cut off
CUT_OFF = Failure(503, FailureKind.SHUTDOWN, "The server shut down before the reply was complete")

log = logging.getLogger(__name__)

SendTo = Callable[[str, Message, int], None]  # process, message, index


class Reply:
    """The reply to one call, for the one task that serves it. Made by Downstream.start.

    prompts             with their request ids
    keep_alive_seconds  time without a word after which `next` returns with nothing; 0: never
    send_next           called whenever one has ended, of a call that is not streamed
    """

    def __init__(
        self,
        streams: Streams,
        prompts: Sequence[Prompt],
        keep_alive_seconds: float,
        send_next: Callable[[], None] | None = None,
    ) -> None:
        self._send_next = send_next
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._gone = False
        self._quiet = False
        self._keep_alive_seconds = keep_alive_seconds
        self._woken_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        if keep_alive_seconds:
            self._timer = self._loop.call_later(keep_alive_seconds, self._check_quiet)
        self._deadline: asyncio.TimerHandle | None = None
        self._streamed = bool(keep_alive_seconds)
        self.choices_of: dict[int, list[Stream]] = {}  # by prompt
        self.streams: list[Stream] = []  # by choice
        self._told: list[Stream] = []  # by choice, whose stream is told of its prompt
        wake = self._wake if send_next is None else self._one_has_ended
        for prompt in prompts:
            own = [
                streams.open(request_id, wake=wake, streamed=self._streamed)
                for request_id in request_ids(prompt.request_id, prompt.choices)
            ]
            self.choices_of[prompt.request_id] = own
            self.streams += own
            self._told += own[:1] * len(own)
        self._only = self.streams[0] if len(self.streams) == 1 else None

    async def next(self) -> list[Part]:
        """What has come since the last call, waiting until something has. Raises ClientGone.

        Of a call that is not streamed, all at once; or what has failed, as soon as something has.
        Nothing when it has been quiet for keep_alive_seconds.
        """
        while not self._gone:
            parts = self._take()
            if parts:
                return parts
            if self._quiet:
                self._quiet = False
                return []
            self._waiter = self._loop.create_future()
            await self._waiter
        raise ClientGone

    @property
    def _is_over(self) -> bool:
        return all(one.ended for one in self.streams) or any(one.failed for one in self.streams)

    def _take(self) -> list[Part]:
        if self._only is not None:  # as most have, for each token
            pieces, end = self._only.take()
            return [Part(0, pieces, end, self._only.prompt)] if pieces or end is not None else []
        if not self._streamed and not self._is_over:
            return []
        taken = enumerate(stream.take() for stream in self.streams)
        return [
            Part(choice, pieces, end, self._told[choice].prompt)
            for choice, (pieces, end) in taken
            if pieces or end is not None
        ]

    def at(self, moment: float, fail: Callable[[], None]) -> None:
        """At that time of the monotonic clock, send nothing more and have it fail."""

        def come() -> None:
            self._send_next = None
            fail()

        left = moment - time.monotonic()
        self._deadline = self._loop.call_later(max(0.0, left), come)

    def client_gone(self) -> None:
        """The client does not wait any more: `next` says so at once."""
        self._gone = True
        self._wake()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._deadline is not None:
            self._deadline.cancel()

    def _one_has_ended(self) -> None:
        if self._send_next is not None:
            self._send_next()
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._woken_at = self._loop.time()
            waiter.set_result(None)

    def _check_quiet(self) -> None:
        """One timer for the whole reply, set again for when the silence will have been too long."""
        left = self._woken_at + self._keep_alive_seconds - self._loop.time()
        if left <= 0:
            self._quiet = True
            self._wake()
            left = self._keep_alive_seconds
        self._timer = self._loop.call_later(left, self._check_quiet)


class Downstream:
    """The way of requests out of this frontend, and of their replies back.

    send  gives a message to a process, without waiting
    """

    def __init__(
        self,
        settings: Settings,
        index: int,
        send: SendTo,
        *,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self.admission = Admission(
            places=max(1, settings.max_concurrent_requests // settings.frontends),
            workers=settings.tokenizer_workers,
        )
        self.aliases = Aliases(
            lambda version: send("scheduler", AliasesTaken(version, index), 0), index
        )
        self._questions = Questions(index, send)
        self._workers = settings.tokenizer_workers
        self._index = index
        self._send = send
        self._keep_alive_seconds = keep_alive_seconds
        self._streams = Streams()
        self._prompts = OpenPrompts(settings.tokenizer_workers, settings.restart_limit)
        self._worker_of: dict[int, int] = {}  # request id -> tokenizer worker
        # Another than before a restart, so that late pieces for a predecessor find nobody.
        self._counter = secrets.randbits(REQUEST_BITS - 1)
        self._idle = asyncio.Event()
        self._idle.set()

    def scheduler_started(self) -> None:
        """Another incarnation. Requests of the one before are ended by their tokenizer workers."""
        names = self.aliases.scheduler_started()
        if names is not None:
            self._send("scheduler", names, 0)

    def deliver(self, message: Pieces) -> None:
        self._streams.deliver(message)
        if message.ends:
            heard = [end.request_id for end in message.ends]
            self._send("scheduler", EndsHeard(heard), 0)

    def worker_started(self, worker: int) -> None:
        """A tokenizer worker was started again: send it all that somebody waits for. The scheduler
        cancels what its predecessor may have been told to cancel."""
        self.admission.worker_started(worker)
        prompts = self._prompts.started(worker)
        open_ids = self._prompts.open_ids(worker)
        self._send("tokenizer_workers", StillOpen(self._index, worker, open_ids), worker)
        for prompt in prompts:
            self._send("tokenizer_workers", prompt, worker)
        self._questions.ask_again(worker)
        if prompts:
            metrics.REPEATED.inc(len(prompts))
            log.info("event=repeated worker=%d requests=%d", worker, len(prompts))

    def tell_prompt(self, message: PromptDetails) -> None:
        self._streams.tell_prompt(message)

    def tokenized(self, message: Tokenized) -> None:
        self._questions.answer(message)

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> Tokenized:
        """The tokens of a text. Takes a place like any request. Raises RequestError."""
        with self._place() as worker:
            return await self._questions.tokenize(
                text, add_special_tokens=add_special_tokens, worker=worker
            )

    @contextmanager
    def start(
        self,
        *prompts: Prompt,
        streamed: bool,
        at_once: int | None = None,
        deadline: Deadline | None = None,
    ) -> Iterator[Reply]:
        """Send the prompts of a call, under request ids of their own; gives what its reply arrives
        in. They are for the same adapter, and take one place together. If at most `at_once` may
        run, each of one choice and not streamed, the others are sent as those before them end.
        What has not ended at its deadline fails then.

        Raises RequestError when nobody is let in. When the context is left before the end has
        come, what is left of the call is cancelled.
        """
        with self._place() as worker:
            numbered = self._numbered(prompts)
            yield from self._start(
                worker, numbered, streamed=streamed, at_once=at_once, deadline=deadline
            )

    @contextmanager
    def _place(self) -> Iterator[int]:
        """A place, and the tokenizer worker that it is at. Raises RequestError."""
        worker = self.admission.enter()
        self._idle.clear()
        try:
            yield worker
        finally:
            self.admission.leave(worker)
            if not self.admission.in_flight:
                self._idle.set()

    def _start(
        self,
        worker: int,
        numbered: list[Prompt],
        *,
        streamed: bool,
        at_once: int | None,
        deadline: Deadline | None,
    ) -> Iterator[Reply]:
        """See start."""
        first = numbered[0]
        left = iter(numbered)

        def send(prompts: Iterable[Prompt]) -> None:
            for prompt in prompts:
                self._prompts.add(worker, prompt, reply.choices_of[prompt.request_id])
                self._send("tokenizer_workers", prompt, worker)

        reply = Reply(
            self._streams,
            numbered,
            self._keep_alive_seconds if streamed else 0.0,
            None if at_once is None else lambda: send(islice(left, 1)),
        )
        for stream in reply.streams:
            self._worker_of[stream.request_id] = worker
        if deadline is not None:
            reply.at(deadline.at, lambda: self._fail(deadlines.passed(deadline), reply.streams))
        try:
            if first.adapter is not None:
                self.aliases.began(first.request_id, first.adapter)
                prefetch = Prefetch(first.adapter, first.adapter_token, first.tenant, first.trace)
                self._send("scheduler", prefetch, 0)
            send(islice(left, at_once))
            yield reply
        finally:
            reply.close()
            unsent = {prompt.request_id for prompt in left}
            for prompt in numbered:
                self._prompts.remove(worker, prompt.request_id)
            for stream in reply.streams:
                self._streams.close(stream.request_id)
                del self._worker_of[stream.request_id]
                if not (stream.ended or stream.request_id in unsent):
                    self._send("tokenizer_workers", Cancel(stream.request_id), worker)
            self.aliases.ended(first.request_id)

    def _fail(self, failure: Failure, streams: Iterable[Stream] | None = None) -> None:
        """End what has not ended, of these streams or of all, and have nobody go on with it."""
        for request_id in self._streams.fail(failure, streams):
            self._send("tokenizer_workers", Cancel(request_id), self._worker_of[request_id])

    def _numbered(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """With the next request ids, as many for each as it has choices."""
        now = time.monotonic()
        numbered = []
        for prompt in prompts:
            first = self._counter + 1
            if first + prompt.choices > 1 << REQUEST_BITS:
                first = 0
            self._counter = first + prompt.choices - 1
            request_id = self._index << REQUEST_BITS | first
            numbered.append(msgspec.structs.replace(prompt, request_id=request_id, arrived=now))
        return numbered

    async def drain(self, seconds: float) -> None:
        """Let nobody in; return when all have left. Those that run longer than that are cut off.

        A client that does not read may stay for LAST_WORDS_SECONDS more, and is then left behind.
        """
        self.admission.drain()
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self._fail(CUT_OFF)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), LAST_WORDS_SECONDS)

    def shut_down(self) -> None:
        """Tell the tokenizer workers that no request will follow."""
        for worker in range(self._workers):
            self._send("tokenizer_workers", Shutdown("frontend", self._index), worker)
