"""What the two families of routes have in common: a request becomes a Call."""

from abc import ABC, abstractmethod
from typing import Protocol

import msgspec

from frontend.exchange import Headers, HttpReply, PiecewiseReply
from frontend.tracing import RequestSpan
from pipeline.errors import RequestError
from pipeline.messages import End, FailureKind, FinishReason, Piece, Prompt, PromptDetails, Usage


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


class Part(msgspec.Struct, frozen=True, gc=False):
    """What has come for one choice since its last part.

    A request's choices are counted from 0: first those of its first prompt, then of the next.
    """

    choice: int
    pieces: list[Piece]
    end: End | None = None
    prompt: PromptDetails | None = None  # in each part, if they were asked for


class WholeShape(ABC):
    """How the reply to a request is written down that comes in one piece."""

    @abstractmethod
    def whole(self, parts: list[Part]) -> HttpReply | PiecewiseReply:
        """One part for each choice, in order, with its end."""

    @abstractmethod
    def refusal(self, error: RequestError) -> HttpReply:
        """The reply when nothing has been sent yet."""

    def failed(self, choice: int, error: RequestError) -> HttpReply:
        """The same, if it is this choice that has failed."""
        return self.refusal(error)


class ChoicesShape(WholeShape):
    """How the reply to a request is written down that may have several choices.

    As ReplyShape in all else.
    """

    @abstractmethod
    def stream_headers(self) -> Headers: ...

    @abstractmethod
    def opening(self) -> bytes: ...

    @abstractmethod
    def events(self, part: Part) -> bytes:
        """What has come for a choice; if it has ended, its last."""

    @abstractmethod
    def closing(self, ends: list[End]) -> bytes:
        """After the last of all choices: their ends, in order."""

    @abstractmethod
    def error_event(self, error: RequestError) -> bytes: ...


class OneChoice(ChoicesShape):
    """Of a request that has one choice, which is all that its shape knows of."""

    def __init__(self, shape: ReplyShape) -> None:
        self._shape = shape

    def whole(self, parts: list[Part]) -> HttpReply:
        [part] = parts
        assert part.end is not None
        return self._shape.whole(part.pieces, part.end)

    def refusal(self, error: RequestError) -> HttpReply:
        return self._shape.refusal(error)

    def stream_headers(self) -> Headers:
        return self._shape.stream_headers()

    def opening(self) -> bytes:
        return self._shape.opening()

    def events(self, part: Part) -> bytes:
        if part.end is None:
            return self._shape.events(part.pieces)
        return self._shape.closing(part.pieces, part.end)

    def closing(self, ends: list[End]) -> bytes:
        return b""

    def error_event(self, error: RequestError) -> bytes:
        return self._shape.error_event(error)


class Call(msgspec.Struct, frozen=True):
    """A request that was understood.

    prompt   its request id and time of arrival are not set yet
    others   prompts that come with it, for the same adapter
    at_once  of its prompts, how many may run; None: all. With `streamed` it is None
    timeout  seconds from its arrival until nobody wants it any more; None: as long as it takes
    """

    prompt: Prompt
    shape: ReplyShape | WholeShape
    streamed: bool
    others: tuple[Prompt, ...] = ()
    span: RequestSpan | None = None  # while it is traced
    at_once: int | None = None
    timeout: float | None = None

    @property
    def whole_shape(self) -> WholeShape:
        return self.shape if isinstance(self.shape, WholeShape) else OneChoice(self.shape)


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


def end_of_all(ends: list[End], *, prompts: int) -> End:
    """The end of a request, of those of its choices: a failure if there is one."""
    [end, *others] = ends
    failed = next((one for one in ends if one.reason == FinishReason.ERROR), None)
    if not others or failed is not None:
        return end if failed is None else failed
    return msgspec.structs.replace(end, usage=usage_of_all([one.usage for one in ends], prompts))


def usage_of_all(usages: list[Usage], prompts: int) -> Usage:
    """A prompt counts once, whatever it has of choices. Times are the longest."""
    of_prompts = usages[:: len(usages) // prompts]
    return Usage(
        prompt_tokens=sum(one.prompt_tokens for one in of_prompts),
        completion_tokens=sum(one.completion_tokens for one in usages),
        cached_tokens=sum(one.cached_tokens for one in of_prompts),
        queue_seconds=max(one.queue_seconds for one in of_prompts),
        first_token_seconds=max(one.first_token_seconds for one in of_prompts),
        total_seconds=max(one.total_seconds for one in usages),
    )


def mean_logprob(part: Part) -> float:
    """Of the tokens of a choice: what `best_of` ranks by, for LoRAX as for OpenAI."""
    tokens = [token for piece in part.pieces for token in piece.tokens]
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    return sum(logprobs) / max(1, len(logprobs))
