"""Each filter against transformers' LogitsProcessor, row by row."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gpu_worker.filters import filter_
from pipeline.messages import Sampling
from tests.gpu_worker.sampling_params import params_of

NO_IDS = torch.zeros((1, 0), dtype=torch.int64)
OFF = Sampling()
vocabularies = st.sampled_from([2, 7, 50, 1500])
widths = st.sampled_from([0.01, 1.0, 6.0])  # of the logits: flat to peaked


def logits(rows: int, vocabulary: int, width: float, seed: int) -> Tensor:
    return torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed)) * width


def filtered(scores: Tensor, samplings: list[Sampling]) -> Tensor:
    scores = scores.clone()
    filter_(scores, params_of(samplings))
    return scores


def check(scores: Tensor, samplings: list[Sampling], oracles: list[list[LogitsProcessor]]) -> None:
    """Each row is what transformers' processors make of it, one after the other."""
    got = filtered(scores, samplings)
    for row, processors in enumerate(oracles):
        expected = scores[row : row + 1]
        for processor in processors:
            expected = processor(NO_IDS, expected)
        assert torch.equal(got[row : row + 1], expected), samplings[row]


KINDS: list[tuple[Callable[[float], Sampling], Callable[[float], LogitsProcessor]]] = [
    (
        lambda x: Sampling(top_k=1 + int(x * 300)),
        lambda x: TopKLogitsWarper(top_k=1 + int(x * 300)),
    ),
    (lambda x: Sampling(top_p=x), lambda x: TopPLogitsWarper(top_p=x)),
    (lambda x: Sampling(typical_p=x), lambda x: TypicalLogitsWarper(mass=x)),
    (lambda x: Sampling(min_p=x), lambda x: MinPLogitsWarper(min_p=x)),
]


@pytest.mark.parametrize(("ours", "theirs"), KINDS, ids=["top_k", "top_p", "typical_p", "min_p"])
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0.02, 0.98), min_size=1, max_size=5),
    off=st.booleans(),
    vocabulary=vocabularies,
    width=widths,
    seed=st.integers(0, 10**6),
)
def test_a_filter_does_what_transformers_does(
    ours: Callable[[float], Sampling],
    theirs: Callable[[float], LogitsProcessor],
    values: list[float],
    off: bool,
    vocabulary: int,
    width: float,
    seed: int,
) -> None:
    samplings, oracles = [ours(value) for value in values], [[theirs(value)] for value in values]
    if off:
        samplings.insert(1, OFF)
        oracles.insert(1, [])
    check(logits(len(samplings), vocabulary, width, seed), samplings, oracles)


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(1, 40),
    top_p=st.floats(0.1, 0.98),
    typical_p=st.floats(0.1, 0.98),
    min_p=st.floats(0.01, 0.5),
    vocabulary=st.sampled_from([50, 400]),
    seed=st.integers(0, 10**6),
)
def test_together_they_apply_in_the_order_top_k_top_p_typical_p_min_p(
    top_k: int, top_p: float, typical_p: float, min_p: float, vocabulary: int, seed: int
) -> None:
    sampling = Sampling(top_k=top_k, top_p=top_p, typical_p=typical_p, min_p=min_p)
    order = [
        TopKLogitsWarper(top_k=top_k),
        TopPLogitsWarper(top_p=top_p),
        TypicalLogitsWarper(mass=typical_p),
        MinPLogitsWarper(min_p=min_p),
    ]
    check(logits(2, vocabulary, 2.0, seed), [sampling, OFF], [order, []])


def test_ties_are_kept_together() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = [False, True, True, True, False]
    assert filtered(scores, [Sampling(top_k=2)]).isfinite().tolist() == [kept]
    assert filtered(scores, [Sampling(top_p=0.6)]).isfinite().tolist() == [kept]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=10**6),
        Sampling(top_p=1e-6),
        Sampling(typical_p=1e-6),
        Sampling(min_p=1.0),
        Sampling(top_k=1, top_p=0.01, typical_p=0.01, min_p=1.0),
    ],
)
def test_at_least_one_token_stays(sampling: Sampling) -> None:
    assert filtered(logits(3, 300, 1.0, 0), [sampling] * 3).isfinite().any(-1).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    scores = logits(3, 1000, 1.0, 0)
    samplings = [Sampling(top_k=5), Sampling(top_p=0.95, top_k=700), Sampling(top_p=0.1, min_p=0.2)]
    together = filtered(scores, samplings)
    for row, sampling in enumerate(samplings):
        assert torch.equal(together[row : row + 1], filtered(scores[row : row + 1], [sampling]))


def test_a_row_that_is_not_finite_breaks_nobody() -> None:
    scores = logits(2, 600, 1.0, 0)
    everything = Sampling(top_k=400, top_p=0.9, typical_p=0.9, min_p=0.1)
    alone = filtered(scores[1:], [everything])
    scores[0, 3] = np.nan
    assert torch.equal(filtered(scores, [everything, everything])[1:], alone)
