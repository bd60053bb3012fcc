"""ZeroMQ sockets between processes: one inbox each, and an outbox to all the others.

Messages are msgspec structs in MessagePack. A process binds its inbox and connects to its peers'
in any order: what is sent before a peer binds waits for it. Order is kept from one sender to one
receiver. Queues between processes are bounded by what the frontend admits, not by ZeroMQ.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from pipeline.messages import Message

M = TypeVar("M")
log = logging.getLogger(__name__)

PROCESSES = ("frontend", "tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader")
MAX_RECEIVED = 256  # messages read before a loop looks at anything else


def address(run_dir: Path, process: str, index: int = 0) -> str:
    """Where the inbox of a process is bound."""
    return f"ipc://{run_dir}/{process}.{index}.sock"


class Inbox(Generic[M]):
    """The one socket that a process binds. `union` is the type of what may arrive.

    What does not decode as `union` is logged and dropped.
    """

    def __init__(self, run_dir: Path, process: str, index: int, union: Any) -> None:
        self._path = Path(address(run_dir, process, index).removeprefix("ipc://"))
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        self._decoder = msgspec.msgpack.Decoder(union)
        self._watched_by: asyncio.AbstractEventLoop | None = None
        self._path.unlink(missing_ok=True)  # a dead process leaves its socket file behind
        self._socket.bind(f"ipc://{self._path}")

    def receive(self, timeout_ms: int | None = None) -> list[M]:
        """What has arrived, at most MAX_RECEIVED; waits up to timeout_ms (None: until something)
        when there is nothing."""
        messages = self._drain()
        if not messages and timeout_ms != 0 and self._socket.poll(timeout_ms, zmq.POLLIN):
            messages = self._drain()
        return messages

    def watch(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[M], None]) -> None:
        """Call on_message for each message from now on, in the loop's thread."""

        def readable() -> None:
            if self._socket.closed:
                return
            messages = self._drain()
            for message in messages:
                on_message(message)
            if len(messages) == MAX_RECEIVED:  # the descriptor is edge triggered
                loop.call_soon(readable)

        self._watched_by = loop
        loop.add_reader(int(self._socket.get(zmq.FD)), readable)
        loop.call_soon(readable)

    def _drain(self) -> list[M]:
        messages: list[M] = []
        while len(messages) < MAX_RECEIVED:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                messages.append(self._decoder.decode(data))
            except msgspec.DecodeError as error:
                log.error("event=message_refused bytes=%d reason=%a", len(data), str(error))
        return messages

    def close(self) -> None:
        """Nothing is received any more, and the socket file is gone."""
        if self._watched_by is not None and not self._watched_by.is_closed():
            self._watched_by.remove_reader(int(self._socket.get(zmq.FD)))
        self._socket.close()
        self._path.unlink(missing_ok=True)


class Outbox:
    """Sends to the inboxes of other processes. Never blocks."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._sockets: dict[tuple[str, int], zmq.Socket[bytes]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, process: str, message: Message, index: int = 0) -> None:
        socket = self._sockets.get((process, index))
        if socket is None:
            socket = self._connect(process, index)
        socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _connect(self, process: str, index: int) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RECONNECT_IVL, 20)  # ms
        socket.connect(address(self._run_dir, process, index))  # may come before the peer binds
        self._sockets[(process, index)] = socket
        return socket

    def drop(self, process: str, index: int = 0) -> None:
        """That process was started again: what its predecessor has not taken is dropped, and
        what is sent from now on takes a connection of its own."""
        socket = self._sockets.pop((process, index), None)
        if socket is not None:
            socket.close(0)

    def close(self, linger_ms: int = 2000) -> None:
        """Close all sockets; waits up to linger_ms for what is still to be sent."""
        for socket in self._sockets.values():
            socket.close(linger_ms)
        self._sockets.clear()
