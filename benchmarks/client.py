"""One request on a connection of its own, by a client that may leave before the end."""

import asyncio
import re
import time
from typing import Any, NamedTuple

from benchmarks.node import encode

LEFT = 0  # in place of a status: the client has gone
BROKEN = -1  # the connection ended without a whole reply


class Outcome(NamedTuple):
    """What a client saw."""

    status: int
    seconds: float
    body: bytes  # without its framing
    head: bytes

    @property
    def ends(self) -> int:
        """How often the reply says that it has ended: 1 is right."""
        if b"text/event-stream" not in self.head:
            return 1 if self.status > 0 else 0
        told = self.body.count(b'"error"') + self.body.count(b"data: [DONE]")
        return told or self.body.count(b'"generated_text":"')

    @property
    def tells_to_retry(self) -> bool:
        return b"retry-after:" in self.head.lower()


async def ask(
    port: int,
    path: str,
    body: Any,
    *,
    leave_after: float | None = None,
    content_type: str = "application/json",
    method: str = "POST",
    headers: str = "",
) -> Outcome:
    """POST a body and read the whole reply, or leave after so many seconds."""
    data = encode(body)
    started = time.monotonic()
    received = b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Outcome(BROKEN, 0.0, b"", b"")
    try:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}"
            f"Content-Type: {content_type}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        async with asyncio.timeout(leave_after):
            while part := await reader.read(1 << 16):
                received += part
    except TimeoutError:
        return Outcome(LEFT, time.monotonic() - started, b"", b"")
    except OSError:
        return Outcome(BROKEN, time.monotonic() - started, received, b"")
    finally:
        writer.close()
    head, _, rest = received.partition(b"\r\n\r\n")
    chunked = b"transfer-encoding: chunked" in head.lower()
    if not head.startswith(b"HTTP/1.1 ") or (chunked and not rest.endswith(b"0\r\n\r\n")):
        return Outcome(BROKEN, time.monotonic() - started, rest, head)
    whole = unchunked(rest) if chunked else rest
    return Outcome(int(head[9:12]), time.monotonic() - started, whole, head)


def unchunked(data: bytes) -> bytes:
    parts = []
    while found := re.match(rb"([0-9a-fA-F]+)\r\n", data):
        size = int(found[1], 16)
        parts.append(data[found.end() : found.end() + size])
        data = data[found.end() + size + 2 :]
    return b"".join(parts)
