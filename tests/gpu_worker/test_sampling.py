"""Penalties against an oracle, the draw against its distribution, the batch without influence."""

from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from gpu_worker.biases import StepBiases
from gpu_worker.sampling import penalise, sample
from pipeline.messages import NOT_FINITE, Sampling
from tests.gpu_worker.sampling_params import sampled_rows

GREEDY = Sampling(temperature=0.0)


def logits(rows: int, vocabulary: int = 40, seed: int = 0) -> Tensor:
    return torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed)) * 2


def tokens(scores: Tensor, samplings: list[Sampling], **rows: Any) -> list[int]:
    chosen: list[int] = sample(scores, sampled_rows(samplings, **rows))[0].tolist()
    return chosen


def penalised_by_hand(scores: Tensor, s: Sampling, history: list[int], prompt: int) -> Tensor:
    """One row, token by token."""
    scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(
        torch.tensor([history]), scores[None].clone()
    )[0]
    for token, count in Counter(history[prompt:]).items():
        scores[token] -= float(np.float32(s.frequency_penalty)) * count
        scores[token] -= float(np.float32(s.presence_penalty))
    return scores


samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 0.8]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            samplings, st.lists(st.integers(0, 19), min_size=1, max_size=30), st.floats(0, 1)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_penalties_are_those_of_transformers_and_openai(
    rows: list[tuple[Sampling, list[int], float]],
) -> None:
    scores = logits(len(rows), 20)
    prompts = [max(1, round(share * len(history))) for _, history, share in rows]
    got = penalise(
        scores,
        sampled_rows(
            [s for s, _, _ in rows],
            histories=[history for _, history, _ in rows],
            prompt_tokens=prompts,
        ),
    )
    for row, (sampling, history, _) in enumerate(rows):
        expected = penalised_by_hand(scores[row], sampling, history, prompts[row])
        torch.testing.assert_close(got[row], expected)


def test_penalties_hold_for_greedy_rows_and_leave_the_logits_alone() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    given = scores.clone()
    penalising = Sampling(temperature=0.0, frequency_penalty=1.5)
    got = tokens(scores, [penalising, GREEDY], histories=[[0, 2], [0, 2]], prompt_tokens=[1, 1])
    assert got == [1, 2]
    assert torch.equal(scores, given)


def test_greedy_rows_get_the_likeliest_token_beside_sampled_ones() -> None:
    scores = logits(5)
    mixed = [GREEDY, Sampling(), GREEDY, Sampling(temperature=9.0, top_k=3), GREEDY]
    got = tokens(scores, mixed)
    assert [got[row] for row in (0, 2, 4)] == scores.argmax(-1)[[0, 2, 4]].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=4),
        Sampling(top_p=0.8),
        Sampling(typical_p=0.7),
        Sampling(min_p=0.1),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling) -> None:
    """Each of 4,000 seeds draws once; every frequency is within five standard deviations."""
    draws = 4000
    scores = logits(1, 12)
    seeded = [msgspec.structs.replace(sampling, seed=seed) for seed in range(draws)]
    got = np.bincount(tokens(scores.expand(draws, -1), seeded), minlength=12) / draws
    probabilities = _distribution(scores[0] / sampling.temperature, sampling)
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(got - probabilities) <= 5 * deviation + 1e-12).all()


def _distribution(scores: Tensor, s: Sampling) -> np.ndarray:
    """Of one row, in the plainest way."""
    p = scores.double().softmax(-1).numpy()
    order = np.argsort(-p)
    keep = np.ones(len(p), bool)
    if s.top_k:
        keep[order[s.top_k :]] = False
    if s.top_p < 1:
        keep[order[1 + np.searchsorted(np.cumsum(p[order]), s.top_p) :]] = False
    if s.typical_p < 1:
        near = np.argsort(np.abs(-np.log(p) + (p * np.log(p)).sum()))
        keep[near[1 + np.searchsorted(np.cumsum(p[near]), s.typical_p) :]] = False
    if s.min_p:
        keep &= p >= s.min_p * p.max()
    kept: np.ndarray = np.where(keep, p, 0) / p[keep].sum()
    return kept


random_samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([0.5, 0.99, 1.0]),
    top_k=st.sampled_from([0, 3, 600]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(random_samplings, min_size=2, max_size=6), dtype=st.sampled_from(["32", "b"]))
def test_a_row_gets_the_same_token_alone_and_in_a_batch(batch: list[Sampling], dtype: str) -> None:
    scores = logits(len(batch), 1000).to(torch.bfloat16 if dtype == "b" else torch.float32)
    histories = [[7, 8, row, 7] for row in range(len(batch))]
    wanted = [row % 2 == 0 for row in range(len(batch))]
    rows = sampled_rows(batch, histories=histories, logprobs=wanted, top=3)
    together, logprobs = sample(scores, rows)
    assert logprobs is not None
    for row, sampling in enumerate(batch):
        only = sampled_rows([sampling], histories=[histories[row]], logprobs=[wanted[row]], top=3)
        alone, logprob = sample(scores[row : row + 1], only)
        assert alone[0] == together[row]
        if wanted[row]:
            assert logprob is not None
            assert torch.equal(logprob[0], logprobs[row // 2])
        else:
            assert logprob is None


def test_another_seed_or_position_draws_another_number() -> None:
    flat = torch.zeros((3, 100_000))
    one, seed, position = tokens(
        flat,
        [Sampling(seed=1), Sampling(seed=2), Sampling(seed=1)],
        histories=[[1], [1], [1, 1]],
    )
    assert len({one, seed, position}) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.9), Sampling(repetition_penalty=2)])
def test_a_row_that_is_not_finite_gets_minus_one_and_nobody_else_does(
    value: float, sampling: Sampling
) -> None:
    scores = logits(3)
    alone = tokens(scores, [sampling] * 3)
    scores[1, 5] = value
    poisoned, logprobs = sample(scores, sampled_rows([sampling] * 3, logprobs=[True] * 3))
    assert poisoned.tolist() == [alone[0], NOT_FINITE, alone[2]]
    assert logprobs is not None
    assert logprobs[[0, 2]].view(torch.float32).isfinite().all()


def test_logprobs_are_the_models_own_whatever_is_sampled_from() -> None:
    """Before bias, penalties, temperature and filters."""
    scores = logits(3)
    cold = Sampling(temperature=0.1, top_k=2, repetition_penalty=3.0)
    biases = StepBiases(np.array([2]), np.array([7]), np.array([50.0], np.float32))
    rows = sampled_rows([cold] * 3, histories=[[4, 5]] * 3, logprobs=[True, False, True])
    chosen, logprobs = sample(scores, rows._replace(biases=biases))
    assert chosen[2] == 7
    expected = scores.log_softmax(-1)[torch.arange(3), chosen]
    assert logprobs is not None
    own = logprobs.view(torch.float32)[:, 0]
    torch.testing.assert_close(own, expected[[0, 2]], rtol=1e-5, atol=0)


def test_logprobs_are_computed_only_if_somebody_wants_them() -> None:
    assert sample(logits(2), sampled_rows([GREEDY, Sampling()]))[1] is None
