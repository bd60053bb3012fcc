"""Embeddings between the device and the frontend."""

import math
from array import array

import pytest

from pipeline.embeddings import is_finite, split


def test_they_are_taken_apart_as_they_were_put_together() -> None:
    one, other = array("f", [1.0, 2.0]).tobytes(), array("f", [3.0, 4.0]).tobytes()
    assert split(one + other, 2) == [one, other]
    assert split(one, 1) == [one]


@pytest.mark.parametrize(("embeddings", "count"), [(b"12345678", 3), (b"", 1), (b"123456", 1)])
def test_another_number_of_them_is_an_error(embeddings: bytes, count: int) -> None:
    with pytest.raises(ValueError, match=f"not {count} embeddings"):
        split(embeddings, count)


def test_one_that_cannot_be_told_is_all_nan() -> None:
    assert is_finite(array("f", [0.0, -1.0]).tobytes())
    assert not is_finite(array("f", [math.nan, math.nan]).tobytes())
