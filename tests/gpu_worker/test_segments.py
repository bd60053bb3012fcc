"""Runs of tokens with the same adapter."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.kernels.segments import make_segments


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), max_size=12))
def test_each_token_lies_in_the_segment_of_its_adapter_and_neighbours_are_joined(
    sequences: list[tuple[int, int]],
) -> None:
    slots = np.array([slot for slot, _ in sequences], np.int64)
    counts = np.array([count for _, count in sequences], np.int64)
    segments = make_segments(slots, counts)

    of_token = np.full(int(counts.sum()), -1)
    for start, end, slot in segments:
        assert start < end
        assert (of_token[start:end] == -1).all()
        of_token[start:end] = slot
    assert (of_token == np.repeat(slots, counts)).all()
    for before, after in itertools.pairwise(segments):
        assert before.end < after.start or before.slot != after.slot
