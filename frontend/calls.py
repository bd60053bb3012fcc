"""What the two families of routes have in common: a request becomes a Call."""

from typing import Protocol

import msgspec

from frontend.exchange import Headers, HttpReply
from frontend.tracing import RequestSpan
from pipeline.errors import RequestError
from pipeline.messages import End, FailureKind, FinishReason, Piece, Prompt


class ReplyShape(Protocol):
    """How the reply to one request is written down. One object per request; it may keep state.

    The parts of a stream are bytes of server-sent events, joined by the caller as they come:
    opening, events*, then closing or events + error_event.
    """

    def whole(self, pieces: list[Piece], end: End) -> HttpReply:
        """The reply to a request that is not streamed."""
        ...

    def refusal(self, error: RequestError) -> HttpReply:
        """The reply when nothing has been sent yet."""
        ...

    def stream_headers(self) -> Headers:
        """What a stream is sent with besides the headers of all streams."""
        ...

    def opening(self) -> bytes: ...

    def events(self, pieces: list[Piece]) -> bytes: ...

    def closing(self, pieces: list[Piece], end: End) -> bytes:
        """The last pieces, and the end that came with them."""
        ...

    def error_event(self, error: RequestError) -> bytes: ...


class Call(msgspec.Struct, frozen=True):
    """A request that was understood.

    prompt  its request id and time of arrival are not set yet
    """

    prompt: Prompt
    shape: ReplyShape
    streamed: bool
    span: RequestSpan | None = None  # while it is traced


class Dialect(Protocol):
    """How a family of routes says that a request went wrong before it was understood."""

    def http_error(self, status: int, message: str, headers: Headers = ()) -> HttpReply:
        """An error of the exchange itself: no such route, not JSON, too large, not ready, ..."""
        ...

    def refusal(self, error: RequestError) -> HttpReply:
        """The reply to a request that failed before anything was sent."""
        ...


def error_of(end: End | None) -> RequestError | None:
    """Why the request failed, or None when it goes on or ended well."""
    if end is None or end.reason != FinishReason.ERROR:
        return None
    if end.failure is None:
        return RequestError(500, FailureKind.INTERNAL, "Incomplete generation")
    return RequestError(end.failure.status, end.failure.kind, end.failure.message)
