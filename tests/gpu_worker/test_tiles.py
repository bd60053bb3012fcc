"""Tiles of segments."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.tiles import BASE, make_tiles, most_tiles

runs = st.lists(st.tuples(st.integers(BASE, 3), st.integers(0, 40)), max_size=10)


def segments_of(of_runs: list[tuple[int, int]]) -> tuple[list[Segment], int]:
    segments, tokens = [], 0
    for slot, count in of_runs:
        if slot != BASE:
            segments.append(Segment(tokens, tokens + count, slot))
        tokens += count
    return segments, tokens


@given(runs, st.sampled_from([1, 16, 64]), st.booleans())
def test_each_token_lies_in_one_tile_of_its_adapter(
    of_runs: list[tuple[int, int]], height: int, with_base: bool
) -> None:
    segments, tokens = segments_of(of_runs)
    tiles = make_tiles(segments, height, tokens if with_base else None)
    assert tiles.dtype == np.int32
    assert len(tiles) <= most_tiles(tokens, height, max(len(of_runs), 1))

    covered = np.zeros(tokens, np.int64)
    of_token = np.full(tokens, BASE)
    for first, count, slot in tiles.tolist():
        assert 1 <= count <= height
        covered[first : first + count] += 1
        of_token[first : first + count] = slot
    expected = np.repeat([slot for slot, _ in of_runs], [count for _, count in of_runs])
    assert (of_token == expected).all()
    assert (covered == (1 if with_base else expected != BASE)).all()
    assert (np.diff(tiles[:, 0]) > 0).all()


def test_a_segment_is_cut_from_its_start() -> None:
    assert make_tiles([Segment(3, 40, 7)], 16).tolist() == [[3, 16, 7], [19, 16, 7], [35, 5, 7]]
