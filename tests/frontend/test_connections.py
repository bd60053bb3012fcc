"""What comes over a socket and is no request, or never becomes one."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from frontend.connections import MAX_HEAD_BYTES, MAX_HEADERS
from tests.end_to_end.server import eventually
from tests.frontend.fakes import says, silence
from tests.frontend.running import Running

SECONDS = 0.5  # for a request to arrive
BODY = json.dumps({"model": "", "prompt": "Hi"}).encode()
STREAM = json.dumps({"model": "", "prompt": "Hi", "stream": True}).encode()
TYPE = b"Content-Type: application/json\r\n"


def post(body: bytes = BODY, more: bytes = b"", length: int | None = None) -> bytes:
    nbytes = len(body) if length is None else length
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%s%sContent-Length: %d\r\n\r\n"
    return head % (TYPE, more, nbytes) + body


def chunked(*chunks: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + TYPE
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running(request_seconds=SECONDS)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    """Whatever came, it is over, and the next client is answered."""
    server.backend.answer = says("Hello")
    yield
    assert eventually(lambda: server.connections == 0)
    assert eventually(lambda: server.backend.downstream.admission.in_flight == 0)
    server.backend.answer = says("Hello")
    assert httpx.post(server.url + "/v1/completions", json=json.loads(BODY)).status_code == 200
    assert eventually(lambda: server.connections == 0)


@pytest.fixture
def connection(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as opened:
        yield opened


def everything(connection: socket.socket) -> bytes:
    """What the server says until it hangs up."""
    received = b""
    try:
        while got := connection.recv(1 << 16):
            received += got
    except ConnectionResetError:  # it hung up on what was still being sent
        pass
    return received


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "sent",
    [
        b"P",
        b"POST /v1/completions HTTP/1.1\r\nHo",
        post()[: -len(BODY)],
        post(BODY[:5], length=len(BODY)),
        post(b"", length=10**15)[:-1],
        chunked(chunk(BODY[:5])),
        chunked(chunk(BODY), b"5"),
        chunked(chunk(BODY), b"0\r\n"),
    ],
)
def test_a_request_that_does_not_arrive_in_full_is_a_408(
    connection: socket.socket, sent: bytes
) -> None:
    connection.sendall(sent)
    reply = everything(connection)
    assert status_of(reply) == 408
    assert b"connection: close" in reply
    assert reply.endswith(b"did not arrive in full within 0.5 seconds")


def test_a_byte_now_and_then_does_not_put_the_end_off(
    server: Running, connection: socket.socket
) -> None:
    def trickle() -> int:
        sent = 0
        try:
            for byte in b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 10_000:
                connection.sendall(bytes([byte]))
                sent += 1
                connection.settimeout(0.05)
                try:
                    if not connection.recv(1 << 16):
                        break
                except TimeoutError:
                    continue
        except OSError:
            pass
        return sent

    assert 2 < trickle() < 200
    assert eventually(lambda: server.connections == 0)


def test_blank_lines_are_no_request_and_do_not_keep_a_connection(
    connection: socket.socket,
) -> None:
    connection.sendall(b"\r\n\r\n")
    assert everything(connection) == b""


def test_a_second_request_has_the_same_time_as_the_first(connection: socket.socket) -> None:
    connection.sendall(post() + post()[:30])
    reply = everything(connection)
    assert status_of(reply) == 200
    assert b"HTTP/1.1 408" in reply


def test_a_body_that_goes_on_after_it_was_refused_is_hung_up_on(
    connection: socket.socket,
) -> None:
    connection.sendall(post(b"x" * 20_000, length=10**9))
    reply = everything(connection)
    assert status_of(reply) == 413
    assert b"HTTP/1.1 408" in reply


def test_a_reply_may_take_longer_than_its_request(
    server: Running, connection: socket.socket
) -> None:
    """And blank lines behind a request, or half of another, do not end its reply."""
    server.backend.answer = silence
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(everything, connection)
        connection.sendall(post(STREAM) + b"\r\n\r\n" + post()[:20])
        with pytest.raises(TimeoutError):
            first.result(4 * SECONDS)
        connection.shutdown(socket.SHUT_RDWR)
        assert b"408" not in first.result(10)


def header_of(nbytes: int) -> bytes:
    return b"X-Long: " + b"a" * nbytes + b"\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        post(more=header_of(MAX_HEAD_BYTES)),
        post(more=b"X-A: b\r\n" * MAX_HEADERS),
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Endless: " + b"a" * (1 << 20),
        b"GET /" + b"a" * (1 << 20),
    ],
    ids=["a header", "headers", "a path", "an endless header", "an endless path"],
)
def test_a_head_that_is_too_large_is_a_431(connection: socket.socket, sent: bytes) -> None:
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(everything, connection)
        with suppress(OSError):
            connection.sendall(sent)
        received = reply.result(20)
    assert received == b"" or status_of(received) == 431  # a reset may overtake the reply
    if len(sent) < 2 * MAX_HEAD_BYTES:
        assert status_of(received) == 431


def test_headers_of_a_usual_size_are_read(connection: socket.socket) -> None:
    connection.sendall(post(more=header_of(MAX_HEAD_BYTES // 2) + b"Connection: close\r\n"))
    assert status_of(everything(connection)) == 200


def test_a_body_in_chunks_is_read(connection: socket.socket) -> None:
    parts = [chunk(BODY[at : at + 3]) for at in range(0, len(BODY), 3)]
    whole = chunked(*parts, b"0\r\nX-Trailer: y\r\n\r\n")
    connection.sendall(whole.replace(b"Host: x", b"Host: x\r\nConnection: close"))
    assert status_of(everything(connection)) == 200


def test_requests_in_a_row_are_answered_in_their_order(connection: socket.socket) -> None:
    paths = [b"/health", b"/nothing", b"/v1/models", b"/ping"] * 50
    requests = [b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths]
    requests.append(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    connection.sendall(b"".join(requests))
    replies = everything(connection).split(b"HTTP/1.1 ")[1:]
    assert [int(reply[:3]) for reply in replies] == [200, 404, 200, 200] * 50 + [200]


STRANGE: dict[str, Callable[[], bytes]] = {
    "no method": lambda: b"\r\n\r\n / HTTP/1.1\r\n\r\n",
    "a method of its own": lambda: b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "binary": lambda: bytes(range(256)),
    "TLS": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "HTTP/2": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": lambda: b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "no path": lambda: b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that is none": lambda: b"GET //[::: HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes beyond ASCII": lambda: "GET /ü HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1"),
    "CONNECT": lambda: b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": lambda: post(more=b"Content-Length: 3\r\n"),
    "a length and chunks": lambda: post(more=b"Transfer-Encoding: chunked\r\n"),
    "a length below zero": lambda: post(length=-1),
    "a length beyond all": lambda: post(length=10**40),
    "a chunk of no length": lambda: chunked(b"xyz\r\n"),
    "a chunk beyond all": lambda: chunked(b"f" * 40 + b"\r\n"),
    "a header without an end": lambda: b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
    "a zero in a header": lambda: b"GET / HTTP/1.1\r\nHost: \0\r\n\r\n",
    "a folded header": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n",
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_no_request_is_refused_or_hung_up_on(connection: socket.socket, case: str) -> None:
    connection.sendall(STRANGE[case]().replace(b"Host: x", b"Host: x\r\nConnection: close"))
    reply = everything(connection)
    assert reply == b"" or 400 <= status_of(reply) < 500, reply


@pytest.mark.parametrize(
    "path",
    ["/%", "/%zz", "/%00", "/%ff%fe", "/v1/models/%ed%a0%80", "/v1/models/%2e%2e%2f", "/%u1234"],
)
def test_a_path_that_is_badly_encoded_is_a_path_like_another(
    connection: socket.socket, path: str
) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    connection.sendall(request.encode())
    reply = everything(connection)
    assert status_of(reply) == 404
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]


def test_many_slow_clients_hold_up_nobody(server: Running) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for one in slow:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
    body = json.loads(BODY)
    assert httpx.post(server.url + "/v1/completions", json=body, timeout=10).status_code == 200
    assert eventually(lambda: server.connections == 0)
    for one in slow:
        one.close()
