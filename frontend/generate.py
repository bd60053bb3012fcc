"""The endpoint of each route that generates or embeds: a body becomes a call, a call a reply."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from frontend import metrics
from frontend.adapter_metrics import AdapterMetrics
from frontend.adapters import UsedAdapters
from frontend.authorization import Authorization, ServerKeys
from frontend.calls import (
    Call,
    ChoicesShape,
    Dialect,
    Part,
    WholeShape,
    end_of_all,
    error_of,
)
from frontend.deadlines import deadline_of, timeout_in
from frontend.downstream import Downstream, Reply
from frontend.exchange import (
    CLIENT_GONE,
    RETRY,
    ClientGone,
    HttpReply,
    Unreadable,
    read_json,
    wait_until_gone,
)
from frontend.processes import Processes
from frontend.sse import HEADERS, KEEP_ALIVE
from frontend.tracing import RequestSpan, Tracing
from pipeline.errors import RequestError
from pipeline.messages import End, FinishReason

log = logging.getLogger(__name__)


class _Failed(NamedTuple):
    choice: int
    end: End
    error: RequestError


def _failed(parts: list[Part]) -> _Failed | None:
    """The first choice that has failed, and the others with it."""
    for part in parts:
        error = error_of(part.end)
        if part.end is not None and error is not None:
            return _Failed(part.choice, part.end, error)
    return None


class Generate:
    """One route, as an ASGI application.

    understand  (body, what its headers show) -> what is asked for, or why it cannot be had
    """

    def __init__(
        self,
        route: str,
        understand: Callable[[bytes, Authorization], Call | HttpReply],
        *,
        dialect: Dialect,
        keys: ServerKeys,
        tracing: Tracing | None,
        downstream: Downstream,
        processes: Processes,
        used: UsedAdapters,
        adapter_metrics: AdapterMetrics,
        max_body_bytes: int,
    ) -> None:
        self._route = route
        self._understand = understand
        self._dialect = dialect
        self._keys = keys
        self._tracing = tracing
        self._downstream = downstream
        self._processes = processes
        self._used = used
        self._adapter_metrics = adapter_metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        span = None if self._tracing is None else self._tracing.begin(self._route, scope, arrived)
        status = CLIENT_GONE
        try:
            understood = await self._read(scope, receive)
            if isinstance(understood, Call):
                understood = traced(understood, span)
                status = await self._answer(understood, arrived, scope, receive, send)
            else:
                status = understood.status
                await understood(scope, receive, send)
        except ClientGone:
            pass
        finally:
            if span is not None:
                span.end(status)
        metrics.REQUESTS.labels(self._route, status).inc()

    async def _read(self, scope: Scope, receive: Receive) -> Call | HttpReply:
        """What the client asks for, or the reply that says what is wrong. Raises ClientGone."""
        missing = self._processes.missing()
        if missing:
            sentence = f"The server is starting; not ready yet: {', '.join(missing)}"
            return self._dialect.http_error(503, sentence, RETRY)
        try:
            self._downstream.admission.check_open()
        except RequestError as error:
            return self._dialect.refusal(error)
        try:
            body = await read_json(scope, receive, self._max_body_bytes)
        except Unreadable as error:
            return self._dialect.http_error(error.status, error.sentence)
        understood = self._understand(body, self._keys.read(scope))
        if isinstance(understood, HttpReply):
            return understood
        try:
            return with_timeout(understood, timeout_in(scope))
        except RequestError as error:
            return understood.shape.refusal(error)

    async def _answer(
        self, call: Call, arrived: float, scope: Scope, receive: Receive, send: Send
    ) -> int:
        """Have it done; gives the status that was sent. Raises ClientGone."""
        try:
            prompts = (call.prompt, *call.others)
            with self._downstream.start(
                *prompts,
                streamed=call.streamed,
                at_once=call.at_once,
                deadline=deadline_of(arrived, call.timeout),
            ) as reply:
                gone = asyncio.create_task(wait_until_gone(receive))
                gone.add_done_callback(lambda _: reply.client_gone())
                try:
                    status, ends = await self._send(
                        call.whole_shape, call.streamed, reply, arrived, scope, receive, send
                    )
                finally:
                    gone.cancel()
        except RequestError as error:
            refusal = call.shape.refusal(error)
            await refusal(scope, receive, send)
            return refusal.status
        self._account(call, end_of_all(ends, prompts=len(prompts)), arrived)
        return status

    async def _send(
        self,
        shape: WholeShape,
        streamed: bool,
        reply: Reply,
        arrived: float,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> tuple[int, list[End]]:
        """Nothing is sent before there is something, so that an early failure has its status.

        Gives the ends of the choices; if one has failed, its alone.
        """
        parts = await reply.next()
        failed = _failed(parts)
        if streamed and (failed is None or any(part.pieces for part in parts)):
            assert isinstance(shape, ChoicesShape)
            return 200, await self._stream(shape, reply, parts, arrived, send)
        if failed is not None:
            refusal = shape.failed(failed.choice, failed.error)
            await refusal(scope, receive, send)
            return refusal.status, [failed.end]
        whole = shape.whole(parts)
        await whole(scope, receive, send)
        return whole.status, [part.end for part in parts if part.end is not None]

    async def _stream(
        self,
        shape: ChoicesShape,
        reply: Reply,
        parts: list[Part],
        arrived: float,
        send: Send,
    ) -> list[End]:
        """Send what has come, and go on as more comes. Raises ClientGone.

        What came while the last part was being sent goes out in one part; nothing waits for more.
        """
        headers = [*HEADERS, *shape.stream_headers()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = shape.opening()
        started = False
        ends: dict[int, End] = {}
        while True:
            if not parts:
                body += KEEP_ALIVE
            for part in parts:
                if part.end is not None:
                    error = error_of(part.end)
                    if error is not None:
                        body += shape.events(Part(part.choice, part.pieces, None, part.prompt))
                        body += shape.error_event(error)
                        await send({"type": "http.response.body", "body": body})
                        return [part.end]
                    ends[part.choice] = part.end
                body += shape.events(part)
            if len(ends) == len(reply.streams):
                break
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b""
            if parts and not started:
                started = True
                metrics.FIRST_TOKEN_SECONDS.labels(self._route).observe(time.monotonic() - arrived)
            parts = await reply.next()
        in_order = [ends[choice] for choice in sorted(ends)]
        await send({"type": "http.response.body", "body": body + shape.closing(in_order)})
        return in_order

    def _account(self, call: Call, end: End, arrived: float) -> None:
        metrics.REQUEST_SECONDS.labels(self._route).observe(time.monotonic() - arrived)
        metrics.ENDS.labels(end.reason.value).inc()
        if call.span is not None:
            call.span.generated(call.prompt.adapter, end)
        adapter = call.prompt.adapter
        if adapter is not None:
            self._adapter_metrics.count(adapter, end.reason, end.usage)
        error = error_of(end)
        if error is not None:
            metrics.FAILURES.labels(error.kind).inc()
            log.info(
                "event=request_failed request_id=%d route=%s kind=%s",
                end.request_id,
                self._route,
                error.kind,
            )
            return
        if end.reason is FinishReason.EMBEDDED:
            metrics.count_embeddings(end.usage, inputs=1 + len(call.others))
        else:
            metrics.count_answer(end.usage)
        if adapter is not None:
            for part in adapter.parts:
                self._used.add(part)


def with_timeout(call: Call, seconds: float | None) -> Call:
    """The call, which has this timeout too: the first to pass counts."""
    if seconds is None or (call.timeout is not None and call.timeout <= seconds):
        return call
    return msgspec.structs.replace(call, timeout=seconds)


def traced(call: Call, span: RequestSpan | None) -> Call:
    """The call, whose prompt says so to all whom it comes to if it is traced."""
    if span is None or not span.traceparent:
        return call
    prompt = msgspec.structs.replace(call.prompt, trace=span.traceparent)
    return msgspec.structs.replace(call, prompt=prompt, span=span)
