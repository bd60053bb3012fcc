"""Connections of clients: uvicorn's, with a limit on the time and the bytes that a request takes.

uvicorn waits for ever for the rest of a request that has begun, and httptools takes a head of any
size. A client that sends a byte now and then would keep its connection, and as many as it opens.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from frontend import metrics
from frontend.slow_readers import SlowReaders

MAX_HEAD_BYTES = 64 << 10  # of the request's line and headers together
MAX_HEADERS = 200
TOO_SLOW = "The request did not arrive in full within {:g} seconds"
TOO_LARGE = "The request's line and headers are too large"


class HeadTooLargeError(Exception):
    """Ends the parser's work on a connection that was answered already."""


class Connection(SlowReaders):
    """One connection, whose client has to read, too.

    A request that does not arrive in time is refused with 408, one whose head is too large with
    431, and the connection is closed.

    request_seconds      from a request's first byte to its last
    slow_reader_seconds  see SlowReaders
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        request_seconds: float,
        slow_reader_seconds: float,
    ) -> None:
        super().__init__(
            config, server_state, app_state, _loop, slow_reader_seconds=slow_reader_seconds
        )
        self._request_seconds = request_seconds
        self._deadline: asyncio.TimerHandle | None = None  # of the request that arrives
        self._begun = False  # whether one does
        self._in_head = True  # what arrives is a head, or what comes before one
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            self._arm()  # also for blank lines, which no request begins with
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, TOO_LARGE)

    # What the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self._arm()

    def on_headers_complete(self) -> None:
        lines = sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        if lines + len(self.url) > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse(431, TOO_LARGE)
            raise HeadTooLargeError
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._disarm()
        self._begun = False
        self._in_head = True
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """The parser's, unless the client was answered already."""
        self._disarm()
        if not self.transport.is_closing():
            super().send_400_response(msg)

    # The limit

    def _arm(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._request_seconds, self._expired)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expired(self) -> None:
        self._deadline = None
        being_answered = self.cycle is not None and not self.cycle.response_complete
        if being_answered and (self.flow.read_paused or not self.cycle.more_body):
            self._arm()  # it is we who do not read on
        elif self._begun:
            self._refuse(408, TOO_SLOW.format(self._request_seconds))
        else:
            self.transport.close()

    def _refuse(self, status: int, sentence: str) -> None:
        """Say so, where that cannot be taken for the rest of another reply, and hang up."""
        self._disarm()
        if self.transport.is_closing():
            return
        metrics.REFUSED_CONNECTIONS.labels(status).inc()
        if self._nothing_is_being_sent():
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
                + b"content-length: %d\r\n\r\n%s" % (len(sentence), sentence.encode())
            )
        self.transport.close()

    def _nothing_is_being_sent(self) -> bool:
        """Nor will be, before the whole of the request that arrives is here."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        return self.cycle.more_body and not self.cycle.response_started and not self.pipeline
