"""A step while it is put together, and what is remembered of it while it is in flight."""

from array import array
from typing import NamedTuple

from pipeline.messages import NewRow, Step
from scheduler.adapter_pool import Extent
from scheduler.sequence import Sequence
from scheduler.step_cost import Work


class Scored(NamedTuple):
    """A chunk whose tokens give the log-probabilities of those after them."""

    sequence: Sequence
    start: int
    tokens: int  # at least one


class StepPlan:
    """Collects one Step. Sequences are in the order that Step gives their rows and chunks."""

    __slots__ = (
        "block_rows",
        "blocks",
        "chunked",
        "chunks",
        "decode_rows",
        "embedded",
        "kv_tokens",
        "new_rows",
        "sampled",
        "scored",
    )

    def __init__(self) -> None:
        self.decode_rows: list[int] = []
        self.kv_tokens = 0  # that the decode rows attend to
        self.sampled: list[Sequence] = []  # one token each, decode rows first
        self.chunks: list[int] = []  # row, start, count of each
        self.chunked: list[Sequence] = []
        self.embedded: list[Sequence] = []  # an embedding each
        self.scored: list[Scored] = []
        self.block_rows: list[int] = []
        self.blocks: list[int] = []
        self.new_rows: list[NewRow] = []

    def is_empty(self) -> bool:
        return not (self.decode_rows or self.chunks)

    def work(self, adapter_bytes: int) -> Work:
        return Work(len(self.decode_rows), self.kv_tokens, adapter_bytes, sum(self.chunks[2::3]))

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

    __slots__ = ("embedded", "sampled", "scored", "sent", "step_id", "unpins", "work")

    def __init__(self, step_id: int, plan: StepPlan, work: Work, sent: float) -> None:
        self.step_id = step_id
        self.sampled = plan.sampled
        self.scored = plan.scored
        self.embedded = plan.embedded
        self.work = work
        self.sent = sent  # when
        self.unpins: list[Extent] = []  # one for each sequence that ended after it was sent


def pack(numbers: list[int]) -> bytes:
    """int32, as arrays travel in messages."""
    return array("i", numbers).tobytes()
