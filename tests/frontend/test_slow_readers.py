"""Clients that read slowly, over sockets: nobody waits for them, and there is a bound."""

import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator

import httpx
import pytest

from frontend.metrics import SLOW_READERS
from pipeline.messages import Cancel, Pieces, Prompt
from tests.end_to_end.server import eventually
from tests.frontend.fakes import end, piece, says
from tests.frontend.running import Running

BOUND = 0.3  # seconds
LONG = "long " * 200_000  # more than all buffers between us and a client hold
PATH = "/v1/completions"


class Asked(Running):
    """A server, and clients that ask it without reading."""

    def ask(self, *, stream: bool, buffer_bytes: int = 4096) -> socket.socket:
        """A connection that has asked for a completion and reads nothing by itself.

        Its own buffer is small, as that of a client who means it.
        """
        body = json.dumps({"model": "", "prompt": "Hi", "stream": stream}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        return connection

    def answer(self, text: str = "Hello") -> str:
        """What another client is answered meanwhile."""
        self.backend.answer = says(text)
        reply = httpx.post(self.url + PATH, json={"model": "", "prompt": "Ho"}, timeout=20)
        return str(reply.json()["choices"][0]["text"])


@pytest.fixture
def server() -> Iterator[Asked]:
    running = Asked(slow_reader_seconds=BOUND)
    yield running
    running.stop()


def endless(prompt: Prompt) -> Iterable[Pieces]:
    """Too much for a client that does not read, without an end."""
    for _ in range(2):
        yield Pieces([piece(LONG, prompt.request_id)])


def whole(prompt: Prompt) -> Iterable[Pieces]:
    yield Pieces([piece(LONG, prompt.request_id)], (end(prompt.request_id),))


def is_reset_while_it_reads_bytes(connection: socket.socket) -> bool:
    """Read a byte now and then until the server has cut somebody off, then what has arrived."""
    before, pause = SLOW_READERS._value.get(), threading.Event()  # never set: time passes
    deadline = time.monotonic() + 20
    try:
        while connection.recv(1):
            pause.wait(0.01)
            if SLOW_READERS._value.get() > before:
                break
            assert time.monotonic() < deadline
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return False


def test_a_stream_that_is_read_by_the_byte_is_cut_off_and_cancelled(server: Asked) -> None:
    server.backend.answer = endless
    with server.ask(stream=True) as connection:
        assert is_reset_while_it_reads_bytes(connection)
    assert server.backend.seen[Cancel].wait(10)
    assert server.answer() == "Hello"
    assert eventually(lambda: server.backend.downstream.admission.in_flight == 0)


def test_what_is_left_of_a_complete_reply_is_not_kept_for_ever(server: Asked) -> None:
    server.backend.answer = whole
    with server.ask(stream=False) as connection:
        assert is_reset_while_it_reads_bytes(connection)
    assert server.backend.cancelled() == []


def test_others_are_answered_while_somebody_does_not_read(server: Asked) -> None:
    server.backend.answer = endless
    slow = [server.ask(stream=True) for _ in range(8)]
    assert server.backend.seen[Prompt].wait(10)
    assert server.answer("others") == "others"
    for connection in slow:
        connection.close()


def test_one_who_reads_slowly_but_enough_has_it_all(server: Asked) -> None:
    server.backend.answer = whole
    with server.ask(stream=False, buffer_bytes=1 << 16) as connection:
        received = 0
        pause = threading.Event()  # never set: time passes
        while data := connection.recv(1 << 15):
            received += len(data)
            pause.wait(0.03)  # about 1 MB/s: many times the least, for longer than BOUND
            if received > len(LONG):
                break
    assert received > len(LONG)
