"""The tokens of a step in tiles of one adapter each, as the CUDA kernels take them: pure numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_worker.kernels.segments import Segment

BASE = -1  # the slot of tokens without an adapter


def make_tiles(
    segments: Sequence[Segment], height: int, tokens: int | None = None
) -> NDArray[np.int32]:
    """Cut segments into tiles.

    segments  in the order of their tokens
    height    the most tokens of a tile
    tokens    of the step; if given, tiles of the slot BASE cover those that no segment has
    returns   [tiles, 3]: first token, count (at least 1), slot; in the order of the tokens
    """
    runs = np.array(segments, np.int64).reshape(-1, 3)
    runs = runs[runs[:, 1] > runs[:, 0]]
    if tokens is not None:
        runs = _with_base(runs, tokens)
    lengths = runs[:, 1] - runs[:, 0]
    tiles_of_run = -(-lengths // height)
    ends = np.cumsum(tiles_of_run)
    number = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - tiles_of_run, tiles_of_run)
    first = np.repeat(runs[:, 0], tiles_of_run) + number * height
    count = np.minimum(height, np.repeat(runs[:, 1], tiles_of_run) - first)
    slot = np.repeat(runs[:, 2], tiles_of_run)
    return np.stack((first, count, slot), axis=1).astype(np.int32)


def most_tiles(tokens: int, height: int, sequences: int) -> int:
    """A bound for steps of `tokens` tokens of at most `sequences` sequences."""
    return min(tokens, tokens // height + 2 * sequences + 1)  # gaps of the base model between them


def _with_base(runs: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    starts = np.append(0, runs[:, 1])
    ends = np.append(runs[:, 0], tokens)
    gaps = np.stack((starts, ends, np.full(len(starts), BASE)), axis=1)
    gaps = gaps[ends > starts]
    both = np.concatenate((runs, gaps))
    return both[np.argsort(both[:, 0], kind="stable")]
