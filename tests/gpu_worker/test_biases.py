"""What is added to single logits, and ends that come too early."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.biases import Biases, biased
from gpu_worker.worker import Worker
from pipeline.messages import NewRow, Sampling
from tests.gpu_worker.driving import GREEDY, Driver, ints, prompt

bias = st.dictionaries(st.integers(0, 9), st.floats(-100, 100, width=32), max_size=4)


def new_row(row: int, sampling: Sampling, ends: tuple[int, ...] = ()) -> NewRow:
    return NewRow(row, -1, ints([1, 2]), 2, 0, b"", sampling, None, ends)


@given(st.lists(bias, min_size=1, max_size=4))
def test_each_row_has_its_own_added_and_the_logits_stay(rows: list[dict[int, float]]) -> None:
    kept = Biases()
    for row, one in enumerate(rows):
        kept.take(new_row(row, Sampling(logit_bias=tuple(one.items()))))
    logits = torch.randn(len(rows), 10)
    given_logits = logits.clone()
    numbers = np.arange(len(rows))[::-1].copy()  # sampled in another order
    step = kept.of_step(numbers, np.full(len(rows), 2))
    if step is None:
        assert not any(rows)
        return
    expected = logits.clone()
    for at, row in enumerate(numbers):
        for token, value in rows[row].items():
            expected[at, token] += value
    torch.testing.assert_close(biased(logits, step), expected)
    assert torch.equal(logits, given_logits)


def test_rows_without_any_cost_nothing() -> None:
    kept = Biases()
    kept.take(new_row(0, Sampling()))
    assert kept.of_step(np.array([0]), np.array([2])) is None
    kept.take(new_row(1, Sampling(logit_bias=((3, 1.0),))))
    assert kept.of_step(np.array([0]), np.array([2])) is None
    kept.free([1])
    assert kept.of_step(np.array([1]), np.array([2])) is None


def test_a_row_that_is_given_again_has_nothing_of_its_last_sequence() -> None:
    kept = Biases()
    kept.take(new_row(1, Sampling(logit_bias=((3, 1.0),))))
    kept.take(new_row(1, Sampling()))
    assert kept.of_step(np.array([1]), np.array([2])) is None


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=4)])
def test_a_token_with_the_greatest_bias_is_produced_and_one_with_the_least_is_not(
    worker: Worker, sampling: Sampling
) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, 6), sampling=sampling)
    driver.generate([0], 5)
    usual = driver.free(0).produced
    banned = tuple((token, -100.0) for token in usual)
    for row, logit_bias in enumerate([(), banned, ((77, 100.0),)]):
        biased_sampling = Sampling(
            temperature=sampling.temperature, seed=sampling.seed, logit_bias=logit_bias
        )
        driver.add(row, prompt(1, 6), sampling=biased_sampling)
    driver.generate([2, 0, 1], 5)
    assert driver.rows[0].produced == usual
    assert not set(driver.rows[1].produced) & set(usual)
    assert driver.rows[2].produced == [77] * 5


def test_an_end_is_not_sampled_before_its_time_and_may_be_then(worker: Worker) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, 6), sampling=Sampling(temperature=0.0, logit_bias=((77, 100.0),)))
    held_back = Sampling(temperature=0.0, logit_bias=((77, 100.0),), min_tokens=3)
    driver.add(1, prompt(1, 6), sampling=held_back, end_token_ids=(77, 78))
    driver.generate([0, 1], 6)
    assert driver.rows[0].produced == [77] * 6
    early, late = driver.rows[1].produced[:3], driver.rows[1].produced[3:]
    assert not {77, 78} & set(early)
    assert late == [77] * 3


def test_produced_tokens_of_before_a_preemption_count(worker: Worker) -> None:
    driver = Driver(worker)
    held_back = Sampling(temperature=0.0, logit_bias=((77, 100.0),), min_tokens=3)
    tokens = prompt(1, 8)
    driver.add(0, tokens, prompt_tokens=6, sampling=held_back, end_token_ids=(77,))
    driver.generate([0], 2)
    assert driver.rows[0].produced[2] != 77
    assert driver.rows[0].produced[3] == 77
