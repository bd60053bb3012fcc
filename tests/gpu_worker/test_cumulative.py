"""The two-level search against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cumulative import BELOW_ONE, BLOCK, first_beyond

widths = st.sampled_from([1, 2, 50, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1500])


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=widths,
    sparse=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_it_finds_what_the_whole_cumulative_sum_says(
    rows: int, width: int, sparse: bool, seed: int
) -> None:
    """Up to rounding: the share lies within the found element, widened by a millionth."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand((rows, width), generator=generator)
    if sparse:
        weights *= torch.rand((rows, width), generator=generator) < 0.05
    weights[:, width // 2] += 0.1
    share = torch.rand((rows, 1), generator=generator, dtype=torch.float64)
    found = first_beyond(weights, share)
    cumulative = weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)
    end = cumulative.gather(1, found)
    start = end - (weights.double() / weights.double().sum(-1, keepdim=True)).gather(1, found)
    assert (start <= share + 1e-6).all()
    assert (end >= share - 1e-6).all()
    assert (weights.gather(1, found) > 0).all()


@pytest.mark.parametrize("share", [0.0, 0.5, BELOW_ONE])
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_a_row_with_one_weight_has_one_answer(share: float, place: int) -> None:
    weights = torch.zeros((1, 2 * BLOCK + 4))
    weights[0, place] = 1e-30
    assert first_beyond(weights, torch.tensor([[share]], dtype=torch.float64)).item() == place


def test_the_ends_of_the_range_are_the_first_and_last_weights() -> None:
    weights = torch.zeros((2, 1000))
    weights[:, 3] = weights[:, 600] = weights[:, 997] = 0.3
    share = torch.tensor([[0.0], [BELOW_ONE]], dtype=torch.float64)
    assert first_beyond(weights, share).tolist() == [[3], [997]]


def test_a_row_that_is_not_finite_gives_an_index_and_harms_no_other() -> None:
    weights = torch.rand(3, 700)
    share = torch.full((3, 1), 0.7, dtype=torch.float64)
    expected = first_beyond(weights, share)
    weights[1, 5] = torch.nan
    found = first_beyond(weights, share)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert 0 <= found[1].item() < 700
