"""The row table."""

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.rows import SAMPLING, RowTable
from pipeline.messages import Logprobs, NewRow, Sampling
from tests.gpu_worker.driving import ints


def table() -> RowTable:
    return RowTable(rows=4, row_tokens=32, block_tokens=4)


def new_row(row: int = 1, **changes: object) -> NewRow:
    fields = {
        "row": row,
        "slot": 3,
        "token_ids": ints([5, 6, 7, 8, 9]),
        "prompt_tokens": 4,
        "cached_tokens": 0,
        "blocks": ints([10, 11]),
        "sampling": Sampling(),
        "logprobs": Logprobs(3),
    }
    return NewRow(**{**fields, **changes})  # type: ignore[arg-type]


def array(*values: int) -> NDArray[np.int64]:
    return np.array(values)


def test_a_new_row_holds_what_the_message_says() -> None:
    rows = table()
    sampling = Sampling(temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1)
    rows.take(new_row(sampling=sampling))
    assert rows.slot.tolist() == [-1, 3, -1, -1]
    assert (rows.length[1], rows.prompt_tokens[1], rows.top[1]) == (5, 4, 3)
    assert {name: rows.sampling[1][name] for name in SAMPLING.names or ()} == {
        name: getattr(sampling, name)
        for name in sampling.__struct_fields__
        if name not in ("logit_bias", "min_tokens")  # see Biases
    }


@pytest.mark.parametrize(("cached", "fresh"), [(0, [10, 11]), (4, [11]), (8, [])])
def test_blocks_beyond_the_cached_tokens_hold_nothing_yet(cached: int, fresh: list[int]) -> None:
    assert table().take(new_row(cached_tokens=cached)).tolist() == fresh


def test_produced_tokens_make_rows_longer() -> None:
    rows = table()
    rows.take(new_row(1))
    rows.take(new_row(2))
    rows.advance(array(2, 1))
    assert rows.length.tolist() == [0, 6, 6, 0]


def test_blocks_are_appended_in_order_also_twice_to_a_row() -> None:
    rows = table()
    rows.take(new_row(1))
    rows.append_blocks(np.array([1, 2, 1], np.int32), np.array([7, 8, 9], np.int32))
    assert rows.page_table[1, :4].tolist() == [10, 11, 7, 9]
    assert rows.page_table[2, 0] == 8


def test_a_token_lies_in_the_block_of_its_position() -> None:
    rows = table()
    rows.take(new_row(1))
    rows.take(new_row(2, blocks=ints([3])))
    slots = rows.kv_slots(array(1, 1, 2, 1), array(0, 7, 2, 4))
    assert slots.tolist() == [40, 47, 14, 44]


def test_a_token_without_a_block_is_refused() -> None:
    rows = table()
    rows.take(new_row(1))
    rows.append_blocks(np.array([1], np.int32), np.array([12], np.int32))
    rows.free(np.array([1], np.int32))
    rows.take(new_row(1))
    with pytest.raises(ValueError, match="no block"):
        rows.kv_slots(array(1), array(8))
