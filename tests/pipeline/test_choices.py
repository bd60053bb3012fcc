"""The requests of one prompt with several replies."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.choices import request_ids, seed_of


def test_the_requests_follow_each_other() -> None:
    assert list(request_ids(7, 3)) == [7, 8, 9]


@given(seed=st.integers(0, 2**64 - 1))
def test_the_first_choice_has_the_seed_that_was_given_and_no_two_share_one(seed: int) -> None:
    seeds = [seed_of(seed, choice) for choice in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= one < 2**64 for one in seeds)
