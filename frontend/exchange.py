"""One HTTP exchange: a body in, a reply out, and who notices that the client has gone."""

import asyncio
from collections.abc import Iterable

import msgspec
from starlette.types import Receive, Scope, Send

Headers = tuple[tuple[bytes, bytes], ...]

JSON: Headers = ((b"content-type", b"application/json"),)
RETRY: Headers = ((b"retry-after", b"1"),)
CLOSE: Headers = ((b"connection", b"close"),)
NO_RETRY: Headers = ((b"x-should-retry", b"false"),)  # OpenAI's clients try 5xx again without it


class HttpReply(msgspec.Struct, frozen=True):
    """A reply that is known in full before its first byte is sent."""

    status: int
    body: bytes
    headers: Headers = JSON

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it: a reply is an ASGI application."""
        length = (b"content-length", str(len(self.body)).encode())
        await send(
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [*self.headers, length],
            }
        )
        await send({"type": "http.response.body", "body": self.body})


class PiecewiseReply(msgspec.Struct, frozen=True):
    """A reply whose body is made as it is sent: however long it is, others have their turns."""

    status: int
    pieces: Iterable[bytes]
    headers: Headers = JSON

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, once."""
        start = {"type": "http.response.start", "status": self.status, "headers": [*self.headers]}
        await send(start)
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


class ClientGone(Exception):
    """The client closed the connection; nobody reads what is sent from now on."""


CLIENT_GONE = 499  # a status for metrics; nobody is sent it


class BodyTooLarge(Exception):
    """More bytes than max_body_bytes; no more than that was kept of it."""


class Unreadable(Exception):
    """The status and the sentence of the reply to a request whose body is not read."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name, given in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def is_json(content_type: str | None) -> bool:
    """Whether a body of this type is JSON, as application/json and application/x+json are."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, if it has at most `limit` bytes. Raises BodyTooLarge and ClientGone.

    What a client goes on to send of a body that is too large is thrown away by the server: were
    the connection closed on it, its own kernel would hide the reply from it.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(body)


async def read_json(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, if its type is JSON. Raises Unreadable and ClientGone."""
    if not is_json(header(scope, b"content-type")):
        raise Unreadable(415, "Expected a Content-Type of application/json")
    try:
        return await read_body(scope, receive, limit)
    except BodyTooLarge as error:
        raise Unreadable(413, f"The body is larger than {limit} bytes") from error


async def wait_until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection, or its reply is complete.

    Comes after read_body. A client may send nothing more, so that one call lasts the request.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
