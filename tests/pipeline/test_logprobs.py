"""Log-probabilities between the device and the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.logprobs import pack, split, unpack

logprobs = st.floats(-30, 0, width=32)
likeliest = st.lists(st.tuples(st.integers(0, 2**31 - 1), logprobs), min_size=2, max_size=2)


@given(rows=st.lists(st.tuples(logprobs, likeliest), max_size=5))
def test_rows_are_taken_apart_as_they_were_put_together(
    rows: list[tuple[float, list[tuple[int, float]]]],
) -> None:
    sent = b"".join(pack(*row) for row in rows)
    assert [unpack(row, 2) for row in split(sent, len(rows))] == rows


def test_a_row_gives_as_many_of_the_likeliest_as_are_wanted_and_there() -> None:
    row = pack(-1.0, [(5, -0.25), (7, -0.5)])
    assert unpack(row, 0) == (-1.0, [])
    assert unpack(row, 1) == (-1.0, [(5, -0.25)])
    assert unpack(row, 9) == (-1.0, [(5, -0.25), (7, -0.5)])


@pytest.mark.parametrize(("rows", "count"), [(b"1234", 2), (b"1234", 0), (b"12345678", 1)])
def test_rows_of_another_number_are_an_error(rows: bytes, count: int) -> None:
    with pytest.raises(ValueError, match=f"not {count} rows"):
        split(rows, count)
