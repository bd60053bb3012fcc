"""Sends requests on their way, and hands each task what comes back for its request."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from frontend.admission import Admission
from frontend.aliases import Aliases
from frontend.exchange import ClientGone
from frontend.streams import Stream, Streams
from pipeline.config import Settings
from pipeline.messages import (
    REQUEST_BITS,
    AliasesTaken,
    Cancel,
    End,
    Failure,
    FailureKind,
    Message,
    Piece,
    Pieces,
    Prefetch,
    Prompt,
    Shutdown,
)

KEEP_ALIVE_SECONDS = 15.0
LAST_WORDS_SECONDS = 1.0  # to send the ends of what the drain cut off
CUT_OFF = Failure(503, FailureKind.SHUTDOWN, "The server shut down before the reply was complete")

SendTo = Callable[[str, Message, int], None]  # process, message, index


class Reply:
    """The reply to one request, for the one task that serves it. Made by Downstream.start.

    keep_alive_seconds  time without a word after which `next` returns with nothing; 0: never
    """

    def __init__(self, streams: Streams, request_id: int, keep_alive_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._gone = False
        self._quiet = False
        self._keep_alive_seconds = keep_alive_seconds
        self._woken_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        if keep_alive_seconds:
            self._timer = self._loop.call_later(keep_alive_seconds, self._check_quiet)
        self.stream: Stream = streams.open(
            request_id, wake=self._wake, streamed=bool(keep_alive_seconds)
        )

    async def next(self) -> tuple[list[Piece], End | None]:
        """What has come since the last call, waiting until something has. Raises ClientGone.

        Nothing, that is `([], None)`, when it has been quiet for keep_alive_seconds.
        """
        while not self._gone:
            taken = self.stream.take()
            if taken[0] or taken[1] is not None:
                return taken
            if self._quiet:
                self._quiet = False
                return taken
            self._waiter = self._loop.create_future()
            await self._waiter
        raise ClientGone

    def client_gone(self) -> None:
        """The client does not wait any more: `next` says so at once."""
        self._gone = True
        self._wake()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

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
        self.aliases = Aliases(lambda version: send("scheduler", AliasesTaken(version, index), 0))
        self._workers = settings.tokenizer_workers
        self._index = index
        self._send = send
        self._keep_alive_seconds = keep_alive_seconds
        self._streams = Streams()
        self._worker_of: dict[int, int] = {}  # request id -> tokenizer worker
        # Another than before a restart, so that late pieces for a predecessor find nobody.
        self._counter = secrets.randbits(REQUEST_BITS - 1)
        self._idle = asyncio.Event()
        self._idle.set()

    def deliver(self, message: Pieces) -> None:
        self._streams.deliver(message)

    @contextmanager
    def start(self, prompt: Prompt, *, streamed: bool) -> Iterator[Reply]:
        """Send the prompt, under a request id of its own; gives what its reply arrives in.

        Raises RequestError when nobody is let in. When the context is left before the end has
        come, the request is cancelled.
        """
        worker = self.admission.enter()
        self._idle.clear()
        self._counter = (self._counter + 1) % (1 << REQUEST_BITS)
        request_id = self._index << REQUEST_BITS | self._counter
        self._worker_of[request_id] = worker
        reply = Reply(self._streams, request_id, self._keep_alive_seconds if streamed else 0.0)
        try:
            if prompt.adapter is not None:
                self.aliases.began(request_id, prompt.adapter)
                prefetch = Prefetch(
                    prompt.adapter, prompt.adapter_token, prompt.tenant, prompt.trace
                )
                self._send("scheduler", prefetch, 0)
            numbered = msgspec.structs.replace(
                prompt, request_id=request_id, arrived=time.monotonic()
            )
            self._send("tokenizer_workers", numbered, worker)
            yield reply
        finally:
            reply.close()
            self._streams.close(request_id)
            if not reply.stream.ended:
                self._send("tokenizer_workers", Cancel(request_id), worker)
            self.aliases.ended(request_id)
            del self._worker_of[request_id]
            self.admission.leave(worker)
            if not self.admission.in_flight:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Let nobody in; return when all have left. Those that run longer than that are cut off.

        A client that does not read may stay for LAST_WORDS_SECONDS more, and is then left behind.
        """
        self.admission.drain()
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for request_id in self._streams.fail(CUT_OFF):
                self._send("tokenizer_workers", Cancel(request_id), self._worker_of[request_id])
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), LAST_WORDS_SECONDS)

    def shut_down(self) -> None:
        """Tell the tokenizer workers that no request will follow."""
        for worker in range(self._workers):
            self._send("tokenizer_workers", Shutdown("frontend", self._index), worker)
