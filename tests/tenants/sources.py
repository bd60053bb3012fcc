"""Where adapters lie and who may read them, as it changes over time."""

import zlib
from collections.abc import Iterable

import msgspec

from pipeline.messages import AdapterKey, Failure, FailureKind

Place = tuple[str, str]  # source, id

GONE = Failure(404, FailureKind.ADAPTER_NOT_FOUND, "there is no such adapter")
FORBIDDEN = Failure(403, FailureKind.ADAPTER_FORBIDDEN, "it may not be read")
DOWN = Failure(503, FailureKind.ADAPTER_UNAVAILABLE, "its source does not answer")


class State(msgspec.Struct, frozen=True):
    """Of one adapter from `since` on. readers are tokens; None: everybody."""

    since: float
    content: str
    readers: frozenset[str] | None

    def lets(self, tokens: Iterable[str]) -> bool:
        return self.readers is None or not self.readers.isdisjoint(tokens)


class Sources:
    """All of them. They never forget how something was."""

    def __init__(self, readers_of: dict[Place, frozenset[str] | None]) -> None:
        self.down = False
        self.now = 0.0
        self.history = {
            place: [State(0.0, f"{'/'.join(place)} 0", readers)]
            for place, readers in readers_of.items()
        }

    def change(self, place: Place) -> None:
        states = self.history[place]
        content = f"{'/'.join(place)} {len(states)}"
        states.append(State(self.now, content, states[-1].readers))

    def allow(self, place: Place, readers: frozenset[str] | None) -> None:
        states = self.history[place]
        states.append(State(self.now, states[-1].content, readers))

    def read(self, key: AdapterKey, token: str | None) -> tuple[int, str] | Failure:
        """Its identity and content, or those of a merge; or why that token has neither."""
        if self.down:
            return DOWN
        contents = []
        for part in key.parts:
            states = self.history.get((part.source, part.id))
            if states is None or part.revision:
                return GONE
            if not states[-1].lets([token] if token else []):
                return FORBIDDEN
            contents.append(states[-1].content)
        content = "+".join(contents)
        return zlib.crc32(content.encode()), content

    def between(self, place: Place, start: float, end: float) -> list[State]:
        """As it was at some time in between."""
        states = self.history[place]
        ends = [*(state.since for state in states[1:]), float("inf")]
        return [
            state
            for state, until in zip(states, ends, strict=True)
            if state.since <= end and until >= start
        ]
