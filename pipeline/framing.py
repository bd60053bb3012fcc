"""Messages between a process and its children: each behind its length, and with open files."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress

MAX_FILES = 253  # descriptors that one message of a socket can carry, SCM_MAX_FD
_HEAD_BYTES = 8  # the length, little-endian


def send(peer: socket.socket, body: bytes, files: Sequence[int] = ()) -> None:
    """The receiver gets descriptors of its own. Raises OSError."""
    socket.send_fds(peer, [len(body).to_bytes(_HEAD_BYTES, "little")], files)
    peer.sendall(body)


def receive(peer: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it. Raises OSError; ConnectionResetError when
    the other side has hung up."""
    start, files, _, _ = socket.recv_fds(peer, _HEAD_BYTES, MAX_FILES)
    if not start:
        raise _hung_up()
    head = start + _exactly(peer, _HEAD_BYTES - len(start))
    return _exactly(peer, int.from_bytes(head, "little")), files


def bodies(peer: socket.socket) -> Iterator[bytes]:
    """What comes without files, until the other side hangs up."""
    with suppress(ConnectionResetError):
        while True:
            yield receive(peer)[0]


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    left = memoryview(data)
    while left:
        received = peer.recv_into(left)
        if not received:
            raise _hung_up()
        left = left[received:]
    return bytes(data)


def _hung_up() -> ConnectionResetError:
    return ConnectionResetError("the other side has hung up")
