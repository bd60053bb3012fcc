"""What counts as decoding, and as waiting to decode."""

import pytest
import torch

from gpu_worker.step_times import DecodeShare, Moment, StepTimes, decode_share


class At(Moment):
    """A moment of a clock that the test sets."""

    def __init__(self, seconds: float) -> None:
        super().__init__(torch.device("cpu"))
        self._seconds = seconds


def step(start: float, end: float, *decode_rows: int) -> StepTimes:
    return StepTimes(At(start), At(end), frozenset(decode_rows))


def test_the_first_decode_step_is_busy_and_nothing_is_idle() -> None:
    assert decode_share(step(1, 3, 0), None) == DecodeShare(busy=2, idle=0)


def test_a_gap_before_a_step_that_goes_on_with_a_row_is_idle() -> None:
    assert decode_share(step(4, 6, 1, 2), step(1, 3, 0, 1)) == DecodeShare(busy=2, idle=1)


@pytest.mark.parametrize("before", [step(1, 3, 5), step(1, 3)], ids=["other rows", "a prefill"])
def test_a_gap_before_a_step_that_was_not_wanted_yet_is_not_idle(before: StepTimes) -> None:
    assert decode_share(step(4, 6, 0), before) == DecodeShare(busy=2, idle=0)


def test_a_step_with_a_prefill_does_not_count() -> None:
    assert decode_share(step(4, 6), step(1, 3, 0)) == DecodeShare(busy=0, idle=0)
