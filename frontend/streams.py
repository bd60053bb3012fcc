"""The state of each request's reply: pieces of text come in, exactly one end goes out. Pure.

A request is known from `open` to `close`. What arrives for any other is ignored: the pieces of a
request whose client has gone are still on their way when it is closed.
"""

from collections.abc import Callable, Iterable

from pipeline.messages import End, Failure, FinishReason, Piece, Pieces, PromptDetails, Usage


class Stream:
    """What has come for one request and has not been taken.

    wake      called when there is something to take: for each piece and the end, or for the end
              alone when the reply is not streamed
    streamed  see wake
    """

    __slots__ = (
        "_end",
        "_pieces",
        "_streamed",
        "_wake",
        "ended",
        "produced",
        "prompt",
        "request_id",
    )

    def __init__(self, request_id: int, *, wake: Callable[[], None], streamed: bool) -> None:
        self.request_id = request_id
        self.ended = False  # its end has come, taken or not
        self.produced = 0  # tokens that its pieces are of
        self.prompt: PromptDetails | None = None  # comes before the first piece, if wanted
        self._pieces: list[Piece] = []
        self._end: End | None = None
        self._wake = wake
        self._streamed = streamed

    @property
    def failed(self) -> bool:
        return self._end is not None and self._end.reason == FinishReason.ERROR

    def push(self, piece: Piece) -> None:
        if self.ended:
            return
        self.produced = piece.produced
        self._pieces.append(piece)
        if self._streamed:
            self._wake()

    def finish(self, end: End) -> None:
        """The first end counts; a second one is ignored."""
        if self.ended:
            return
        self.ended = True
        self._end = end
        self._wake()

    def fail(self, failure: Failure) -> None:
        """End it for our own reason, if it has not ended."""
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        self.finish(End(self.request_id, FinishReason.ERROR, usage, failure))

    def take(self) -> tuple[list[Piece], End | None]:
        """All that has come since the last call; an end is given out once, with the last pieces.

        Of a reply that is not streamed, nothing before its end.
        """
        if not (self._streamed or self.ended):
            return [], None
        pieces, self._pieces = self._pieces, []
        end, self._end = self._end, None
        return pieces, end


class Streams:
    """The open requests."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: int, *, wake: Callable[[], None], streamed: bool) -> Stream:
        if request_id in self._streams:
            raise ValueError(f"request {request_id} is open already")
        stream = Stream(request_id, wake=wake, streamed=streamed)
        self._streams[request_id] = stream
        return stream

    def close(self, request_id: int) -> None:
        del self._streams[request_id]

    def deliver(self, message: Pieces) -> None:
        """Hand out what a step gave. A request's piece precedes its end."""
        streams = self._streams
        for piece in message.pieces:
            stream = streams.get(piece.request_id)
            if stream is not None:
                stream.push(piece)
        for end in message.ends:
            stream = streams.get(end.request_id)
            if stream is not None:
                stream.finish(end)

    def tell_prompt(self, message: PromptDetails) -> None:
        stream = self._streams.get(message.request_id)
        if stream is not None:
            stream.prompt = message

    def fail(self, failure: Failure, streams: Iterable[Stream] | None = None) -> list[int]:
        """End what has not ended, of these or of all, for our own reason; gives the request ids."""
        of = self._streams.values() if streams is None else streams
        running = [stream for stream in of if not stream.ended]
        for stream in running:
            stream.fail(failure)
        return [stream.request_id for stream in running]
