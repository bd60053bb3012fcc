"""The end of connections whose client takes next to nothing of what it is sent.

What a client does not take waits in the connection's buffer; beyond uvicorn's high-water mark the
reply is not written on, and what follows waits in its stream, which the context bounds. Neither
holds up anybody else. A client that takes less than LEAST_BYTES in slow_reader_seconds, while the
writer waits for it or after its reply is complete, is cut off: its request ends as if it had gone.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from frontend import metrics

LEAST_BYTES = 8192  # to take in slow_reader_seconds, or all that waits
KERNEL_BYTES = 16 << 10  # not sent yet: it takes more when half of that has gone, LEAST_BYTES
AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds

log = logging.getLogger(__name__)


def bound_kernel_buffers(listener: socket.socket) -> None:
    """Its connections inherit it. Else the kernel takes megabytes of what nobody reads."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and listener.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # as in some sandboxes; it is a bound less
            listener.setsockopt(socket.IPPROTO_TCP, option, KERNEL_BYTES)


class SlowReaders(HttpToolsProtocol):
    """One connection. Timers run only while something waits for its client.

    slow_reader_seconds  in which a client takes LEAST_BYTES, or all that waits for it
    """

    def __init__(self, *args: Any, slow_reader_seconds: float, **named: Any) -> None:
        super().__init__(*args, **named)
        self._slow_reader_seconds = slow_reader_seconds
        self._slow_timer: asyncio.TimerHandle | None = None
        self._waited = 0  # bytes, when the timer was set

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._slow_timer is None and self.transport.get_write_buffer_size():
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._stop_watching()
        self._waited = self.transport.get_write_buffer_size()
        self._slow_timer = self.loop.call_later(self._slow_reader_seconds, self._look)

    def _stop_watching(self) -> None:
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None

    def _look(self) -> None:
        """A reply that is neither complete nor waited with adds to the buffer, as it should."""
        self._slow_timer = None
        waits = self.transport.get_write_buffer_size()
        held_up = self.flow.write_paused or self.cycle is None or self.cycle.response_complete
        if not waits or not held_up:
            return
        if waits <= self._waited - LEAST_BYTES:
            self._watch()
            return
        metrics.SLOW_READERS.inc()
        log.info("event=slow_reader_cut_off waiting_bytes=%d", waits)
        self._forget_what_waits()
        self.transport.abort()

    def _forget_what_waits(self) -> None:
        """The kernel would go on with it for as long as the client takes a byte now and then."""
        end: socket.socket | None = self.transport.get_extra_info("socket")
        if end is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
