"""ZeroMQ sockets between processes: one inbox each, and an outbox to all the others.

Messages are msgspec structs in MessagePack. A process binds its inbox and connects to its peers'
in any order: what is sent before a peer binds waits for it. Order is kept from one sender to one
receiver. Queues between processes are bounded by what the frontend admits, not by ZeroMQ.

A conversation is one between two incarnations. Before each message stands which incarnation of
which process has sent it, and for which incarnation of its receiver it is meant: the latest that
the sender has heard of. What comes from an incarnation that has a successor, or was meant for a
predecessor, is dropped: ZeroMQ keeps what a dead peer has not read for whoever binds its address
next. What is sent to a peer that nobody has heard of yet waits in the outbox. Whoever starts
greets its peers, and is greeted in return.

An inbox gives PeerStarted before the first message of an incarnation, and never in one list with
what came before it, so that all answers to that are sent, or known to be late, by then. Those
who do not say which incarnation they are (tests, threads of a process of its own) are heard, and
never dropped.
"""

import asyncio
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec
import zmq

from pipeline.incarnation import Incarnation
from pipeline.messages import Message, PeerStarted

M = TypeVar("M")
log = logging.getLogger(__name__)

PROCESSES = ("frontend", "tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader")
NO_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what decoding raises
MAX_RECEIVED = 256  # messages read before a loop looks at anything else

Peer = tuple[str, int]  # a process and its index
_ENVELOPE = struct.Struct("<QQBB")  # sender's incarnation, receiver's; sender's process and index


def address(run_dir: Path, process: str, index: int = 0) -> str:
    """Where the inbox of a process is bound."""
    return f"ipc://{run_dir}/{process}.{index}.sock"


def remove_inbox(run_dir: Path, process: str, index: int) -> None:
    """Of a process that is dead, and may have left the file of its socket behind."""
    Path(address(run_dir, process, index).removeprefix("ipc://")).unlink(missing_ok=True)


class Inbox(Generic[M]):
    """The one socket that a process binds. `union` is the type of what may arrive.

    What does not decode as `union` is logged and dropped.

    outbox  of the same process; without one, nobody is told of PeerStarted, and nothing is dropped
    """

    def __init__(
        self, run_dir: Path, process: str, index: int, union: Any, outbox: "Outbox | None" = None
    ) -> None:
        self._path = Path(address(run_dir, process, index).removeprefix("ipc://"))
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        self._decoder = msgspec.msgpack.Decoder(union)
        self._outbox = outbox
        self._next: bytes | None = None  # the first of an incarnation, for the next list
        self._of_latest: set[bytes] = set()  # envelopes of what is for us, from the latest of each
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._watched_by: asyncio.AbstractEventLoop | None = None
        self._path.unlink(missing_ok=True)  # a dead process leaves its socket file behind
        self._socket.bind(f"ipc://{self._path}")

    def receive(self, timeout_ms: int | None = None) -> list[M]:
        """What has arrived, at most MAX_RECEIVED; waits up to timeout_ms (None: until something)
        when there is nothing, and anew after what is no message."""
        messages: list[M] = []
        while not messages and (self._next is not None or self._poller.poll(timeout_ms)):
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
            if messages:  # the descriptor is edge triggered, and there may be more
                loop.call_soon(readable)

        self._watched_by = loop
        loop.add_reader(int(self._socket.get(zmq.FD)), readable)
        loop.call_soon(readable)

    def _drain(self) -> list[M]:
        messages: list[M] = []
        while len(messages) < MAX_RECEIVED:
            received, self._next = self._next, None
            if received is None:
                if not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:  # cheaper than zmq.Again
                    break
                received = self._socket.recv(zmq.NOBLOCK)
            body = self._body(received)
            if body is None:
                continue
            if self._outbox is None or self._is_for_us(received, messages, self._outbox):
                messages += body
            elif self._next is not None:
                break
        return messages

    def _is_for_us(self, received: bytes, messages: list[M], outbox: "Outbox") -> bool:
        """Whether it is to be decoded now. If another incarnation has sent it, those before it
        are dealt with first."""
        envelope = received[: _ENVELOPE.size]
        if envelope in self._of_latest:
            return True
        sender, receiver, process, index = _ENVELOPE.unpack(envelope)
        if sender and process < len(PROCESSES):
            peer = (PROCESSES[process], index)
            known = outbox.known(peer)
            if sender < known:
                return False
            if sender > known:
                if messages:
                    self._next = received
                    return False
                outbox.heard_of(peer, sender)
                self._of_latest.clear()
                messages.append(cast(M, PeerStarted(*peer, again=bool(known))))
        if receiver not in (0, outbox.number):
            return False
        self._of_latest.add(envelope)
        return True

    def _body(self, received: bytes) -> list[M] | None:
        """The message, or nothing for a greeting; None for bytes that are neither. These are not
        believed who has sent them either: whom they name would not be heard any more."""
        body = memoryview(received)[_ENVELOPE.size :]
        try:
            if len(received) < _ENVELOPE.size:
                raise msgspec.DecodeError("no envelope")
            return [self._decoder.decode(body)] if body else []
        except NO_MESSAGE as error:
            log.error("event=message_refused bytes=%d reason=%a", len(body), str(error))
            return None

    def close(self) -> None:
        """Nothing is received any more, and the socket file is gone."""
        if self._watched_by is not None and not self._watched_by.is_closed():
            self._watched_by.remove_reader(int(self._socket.get(zmq.FD)))
        self._socket.close()
        self._path.unlink(missing_ok=True)


class Outbox:
    """Sends to the inboxes of other processes. Never blocks.

    incarnation  of the process that sends; without one, messages are for any of their receiver's
    """

    def __init__(self, run_dir: Path, incarnation: Incarnation | None = None) -> None:
        self._run_dir = run_dir
        self._incarnation = incarnation
        self.number = 0 if incarnation is None else incarnation.number
        self._known: dict[Peer, int] = {}  # the latest incarnation of each that was heard of
        self._waiting: dict[Peer, list[bytes]] = {}  # for those that were not
        self._sockets: dict[Peer, zmq.Socket[bytes]] = {}
        self._envelopes: dict[Peer, bytes] = {}  # of what is sent to each
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, process: str, message: Message, index: int = 0) -> None:
        peer = (process, index)
        body = self._encoder.encode(message)
        if self._incarnation is None or peer in self._known:
            self._send(peer, body)
        else:
            self._waiting.setdefault(peer, []).append(body)

    def greet(self, process: str, count: int = 1) -> None:
        """Tell the first `count` of a process, but for this one, that this one has started."""
        me = self._incarnation
        for index in range(count):
            if me is None or (process, index) != (me.process, me.index):
                self._send((process, index), b"")

    def known(self, peer: Peer) -> int:
        """The incarnation that is spoken with; 0 if none was heard of."""
        return self._known.get(peer, 0)

    def heard_of(self, peer: Peer, number: int) -> None:
        """From now on this incarnation of it is spoken with."""
        self._known[peer] = number
        self._envelopes.pop(peer, None)
        self._send(peer, b"")  # it may have started after it was greeted
        for body in self._waiting.pop(peer, ()):
            self._send(peer, body)

    def _send(self, peer: Peer, body: bytes) -> None:
        socket = self._sockets.get(peer)
        if socket is None:
            socket = self._connect(*peer)
        envelope = self._envelopes.get(peer)
        if envelope is None:
            envelope = self._envelopes[peer] = self._envelope(peer)
        socket.send(envelope + body, zmq.NOBLOCK)

    def _envelope(self, peer: Peer) -> bytes:
        me, receiver = self._incarnation, self._known.get(peer, 0)
        if me is None:
            return _ENVELOPE.pack(0, receiver, 0, 0)
        return _ENVELOPE.pack(me.number, receiver, PROCESSES.index(me.process), me.index)

    def _connect(self, process: str, index: int) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RECONNECT_IVL, 20)  # ms
        socket.connect(address(self._run_dir, process, index))  # may come before the peer binds
        self._sockets[(process, index)] = socket
        return socket

    def close(self, linger_ms: int = 2000) -> None:
        """Close all sockets; waits up to linger_ms for what is still to be sent. What waits for a
        peer that was not heard of is left to whoever it will be."""
        for peer, bodies in self._waiting.items():
            for body in bodies:
                self._send(peer, body)
        self._waiting.clear()
        for socket in self._sockets.values():
            socket.close(linger_ms)
        self._sockets.clear()
