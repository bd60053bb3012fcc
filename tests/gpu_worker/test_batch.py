"""From steps to arrays."""

import numpy as np
import pytest

from gpu_worker.batch import HostBatch, make_batch
from gpu_worker.rows import RowTable
from pipeline.messages import NewRow, Step
from tests.gpu_worker.driving import GREEDY, ints


def table() -> RowTable:
    """Rows 0 to 4: tokens 10r, 10r + 1, ...; 6 of them; blocks 2r, 2r + 1; adapters as below."""
    rows = RowTable(rows=6, row_tokens=16, block_tokens=4)
    for row, slot in enumerate([1, -1, 0, 1, -1]):
        tokens = ints(range(10 * row, 10 * row + 6))
        rows.take(NewRow(row, slot, tokens, 6, 0, ints([2 * row, 2 * row + 1]), GREEDY, None))
    return rows


def step(decode: list[int], chunks: list[tuple[int, int, int]]) -> Step:
    return Step(1, decode_rows=ints(decode), prefill=np.array(chunks, np.int32).tobytes())


def fed(batch: HostBatch) -> list[int]:
    tokens: list[int] = (10 * batch.token_rows + batch.positions).tolist()
    return tokens


def test_decode_rows_come_first_then_chunks_each_sorted_by_adapter() -> None:
    batch = make_batch(step([0, 2, 1], [(3, 1, 2), (4, 0, 3)]), table())
    assert fed(batch) == [15, 25, 5, 40, 41, 42, 31, 32]
    assert batch.positions.tolist() == [5, 5, 5, 0, 1, 2, 1, 2]
    assert batch.kv_slots.tolist() == [13, 21, 5, 32, 33, 34, 25, 26]
    assert batch.segments == [(1, 2, 0), (2, 3, 1), (6, 8, 1)]
    assert batch.sequences.decode_rows == 3
    assert batch.sequences.query_lengths.tolist() == [1, 1, 1, 3, 2]
    assert batch.sequences.lengths.tolist() == [6, 6, 6, 3, 3]
    assert batch.sequences.page_table.tolist() == [[2, 3], [4, 5], [0, 1], [8, 9], [6, 7]]


def test_what_is_sampled_keeps_the_order_of_the_step() -> None:
    batch = make_batch(step([0, 1], [(2, 3, 3), (3, 0, 2), (4, 5, 1)]), table())
    assert batch.sampled_rows.tolist() == [0, 1, 2, 4]
    assert [fed(batch)[token] for token in batch.sampled] == [5, 15, 25, 45]


def test_a_chunk_inside_its_prompt_samples_nothing() -> None:
    batch = make_batch(step([], [(2, 0, 5)]), table())
    assert len(batch.sampled) == len(batch.sampled_rows) == 0


def test_a_row_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no sequence has"):
        make_batch(step([5], []), table())
