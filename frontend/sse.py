"""How server-sent events are written."""

from frontend.exchange import Headers

KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def event(json: bytes) -> bytes:
    """One event. JSON has no line break outside of its strings, and none unescaped in them."""
    return b"data: " + json + b"\n\n"
