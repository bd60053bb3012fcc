"""OpenAI's replies to requests that have several choices, or that echo their prompts."""

import msgspec

from frontend.calls import ChoicesShape, Part, end_of_all, mean_logprob
from frontend.exchange import Headers, HttpReply
from frontend.openai_replies import Shape, refusal
from pipeline.errors import RequestError
from pipeline.messages import End, FinishReason, Piece


class Shown(msgspec.Struct, frozen=True):
    """What becomes of the choices that are made.

    prompts  that the request has
    made     choices of each
    shown    the best of these; all of them if they are as many
    silent   nothing of what is produced is shown: `max_tokens` is 0
    """

    prompts: int = 1
    made: int = 1
    shown: int = 1
    silent: bool = False


class Choices(ChoicesShape):
    """The reply, of one shape for each choice that is shown, which all have the same id."""

    def __init__(self, shapes: list[Shape], asked: Shown) -> None:
        self._shapes = shapes
        self._asked = asked
        self._begun: set[int] = set()

    def whole(self, parts: list[Part]) -> HttpReply:
        parts = [self._shown(part) for part in parts]
        shown = [part for group in self._by_prompt(parts) for part in self._best(group)]
        choices = [
            shape.choice(_with_prompt(part), _end(part))
            for shape, part in zip(self._shapes, shown, strict=True)
        ]
        return self._shapes[0].reply(choices, self._end([_end(part) for part in parts]))

    def refusal(self, error: RequestError) -> HttpReply:
        return refusal(error)

    def stream_headers(self) -> Headers:
        return ()

    def opening(self) -> bytes:
        return b"".join(shape.opening() for shape in self._shapes)

    def events(self, part: Part) -> bytes:
        """What is streamed is all that is made: whichever is best is not known yet."""
        shape, part = self._shapes[part.choice], self._shown(part)
        pieces = part.pieces
        if part.choice not in self._begun:
            self._begun.add(part.choice)
            pieces = _with_prompt(part)
        return shape.events(pieces) if part.end is None else shape.ending(pieces, part.end)

    def closing(self, ends: list[End]) -> bytes:
        if self._asked.silent:
            ends = [_silent_end(end) for end in ends]
        return self._shapes[0].done(self._end(ends))

    def error_event(self, error: RequestError) -> bytes:
        return self._shapes[0].error_event(error)

    def _shown(self, part: Part) -> Part:
        if not self._asked.silent:
            return part
        return msgspec.structs.replace(
            part, pieces=[], end=None if part.end is None else _silent_end(part.end)
        )

    def _end(self, ends: list[End]) -> End:
        return end_of_all(ends, prompts=self._asked.prompts)

    def _by_prompt(self, parts: list[Part]) -> list[list[Part]]:
        made = self._asked.made
        return [parts[start : start + made] for start in range(0, len(parts), made)]

    def _best(self, parts: list[Part]) -> list[Part]:
        """Those whose tokens are the likeliest on average, the best of them first."""
        if self._asked.shown == self._asked.made:
            return parts
        return sorted(parts, key=mean_logprob, reverse=True)[: self._asked.shown]


def _end(part: Part) -> End:
    assert part.end is not None
    return part.end


def _with_prompt(part: Part) -> list[Piece]:
    """All that it has, the prompt first, where it is echoed."""
    if part.prompt is None:
        return part.pieces
    prompt = part.prompt
    return [Piece(prompt.request_id, prompt.text, prompt.tokens), *part.pieces]


def _silent_end(end: End) -> End:
    """The one token that was produced was not asked for."""
    usage = msgspec.structs.replace(end.usage, completion_tokens=0)
    return msgspec.structs.replace(end, reason=FinishReason.LENGTH, usage=usage)
