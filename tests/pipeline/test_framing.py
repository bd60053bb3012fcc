"""Messages between a process and its children."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.framing import bodies, receive, send

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@given(sent=st.lists(st.binary(max_size=64), max_size=6))
def test_what_is_sent_arrives_message_by_message(sent: list[bytes]) -> None:
    one, other = socket.socketpair()
    with other:
        with one:
            for body in sent:
                send(one, body)
        assert list(bodies(other)) == sent


def test_a_message_may_be_longer_than_a_socket_holds(pair: Pair) -> None:
    body = os.urandom(4 << 20)
    sender = threading.Thread(target=send, args=(pair[0], body))
    sender.start()
    assert receive(pair[1]) == (body, [])
    sender.join()


def test_open_files_go_with_their_message(pair: Pair, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_text(path.name)
    files = [os.open(path, os.O_RDONLY) for path in paths]
    send(pair[0], b"two", files)
    send(pair[0], b"none")
    for file in files:
        os.close(file)
    body, received = receive(pair[1])
    assert (body, [os.read(file, 9) for file in received]) == (b"two", [b"a", b"b"])
    for file in received:
        os.close(file)
    assert receive(pair[1]) == (b"none", [])


@pytest.mark.parametrize("sent", [b"", b"\5\0\0", (5).to_bytes(8, "little") + b"four"])
def test_one_that_hangs_up_is_told_from_one_that_says_nothing(pair: Pair, sent: bytes) -> None:
    pair[0].sendall(sent)
    pair[0].close()
    with pytest.raises(ConnectionResetError):
        receive(pair[1])


def test_one_that_is_waited_for_too_long_is_another_error(pair: Pair) -> None:
    pair[0].sendall((5).to_bytes(8, "little") + b"four")
    pair[1].settimeout(0.05)
    with pytest.raises(TimeoutError):
        receive(pair[1])
