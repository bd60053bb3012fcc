"""A step while it is put together, and what is remembered of it while it is in flight."""

from array import array

from pipeline.messages import AdapterKey, NewRow, Step
from scheduler.sequence import Sequence


class StepPlan:
    """Collects one Step. Sequences are in the order that Step gives their rows and chunks."""

    __slots__ = (
        "block_rows",
        "blocks",
        "chunked",
        "chunks",
        "decode_rows",
        "new_rows",
        "sampled",
    )

    def __init__(self) -> None:
        self.decode_rows: list[int] = []
        self.sampled: list[Sequence] = []  # one token each, decode rows first
        self.chunks: list[int] = []  # row, start, count of each
        self.chunked: list[Sequence] = []
        self.block_rows: list[int] = []
        self.blocks: list[int] = []
        self.new_rows: list[NewRow] = []

    def is_empty(self) -> bool:
        return not (self.decode_rows or self.chunks)

    def step(self, step_id: int, free_rows: list[int]) -> Step:
        return Step(
            step_id=step_id,
            decode_rows=pack(self.decode_rows),
            prefill=pack(self.chunks),
            block_rows=pack(self.block_rows),
            blocks=pack(self.blocks),
            free_rows=pack(free_rows),
            new_rows=tuple(self.new_rows),
        )


class Flight:
    """A step that the worker has and has not reported."""

    __slots__ = ("sampled", "step_id", "unpins")

    def __init__(self, step_id: int, sampled: list[Sequence]) -> None:
        self.step_id = step_id
        self.sampled = sampled
        self.unpins: list[AdapterKey] = []  # one for each sequence that ended after it was sent


def pack(numbers: list[int]) -> bytes:
    """int32, as arrays travel in messages."""
    return array("i", numbers).tobytes()
