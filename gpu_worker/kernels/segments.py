"""Which tokens of a step belong to which adapter; worked out once per step for all layers."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segment(NamedTuple):
    """Tokens start to end (exclusive) of a step have the adapter in this slot."""

    start: int
    end: int
    slot: int


def make_segments(slots: NDArray[np.int64], counts: NDArray[np.int64]) -> list[Segment]:
    """The longest runs of tokens with the same adapter, in order, without those of the base model.

    slots   of each sequence, in the order of the tokens; -1 is the base model
    counts  tokens of each sequence
    """
    if not len(slots):
        return []
    ends = np.cumsum(counts)
    last = np.append(slots[1:] != slots[:-1], True)
    run_ends = ends[last]
    run_starts = np.concatenate(([0], run_ends[:-1]))
    return [
        Segment(start, end, slot)
        for start, end, slot in zip(
            run_starts.tolist(), run_ends.tolist(), slots[last].tolist(), strict=True
        )
        if slot >= 0 and end > start
    ]
