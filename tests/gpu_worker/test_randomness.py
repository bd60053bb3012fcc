"""The counter-based numbers: uniform, and independent along both keys."""

import numpy as np
import pytest

from gpu_worker.randomness import uniform

SEEDS = np.array([0, 1, 2, 2**63, 2**64 - 1], np.uint64)


def grid(seeds: int, positions: int) -> np.ndarray:
    """uniform(seed, position) for the first seeds and positions."""
    seed, position = np.meshgrid(np.arange(seeds, dtype=np.uint64), np.arange(positions))
    return uniform(seed.ravel(), position.ravel()).reshape(positions, seeds).T


def test_a_number_depends_on_its_seed_and_position_alone() -> None:
    positions = np.array([5, 0, 5, 123456, 7])
    together = uniform(SEEDS, positions)
    for index in range(len(SEEDS)):
        alone = uniform(SEEDS[index : index + 1], positions[index : index + 1])
        assert alone[0] == together[index]


def test_numbers_lie_in_the_half_open_unit_interval() -> None:
    numbers = grid(300, 300)
    assert numbers.min() >= 0
    assert numbers.max() < 1


@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_are_uniform_along_seeds_and_positions(axis: int) -> None:
    for line in np.moveaxis(grid(20_000, 3) if axis == 0 else grid(3, 20_000), axis, 1):
        counts, _ = np.histogram(line, bins=20, range=(0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi squared, 19 degrees of freedom


def test_neighbouring_seeds_and_positions_are_not_correlated() -> None:
    numbers = grid(400, 400)
    for shifted in (numbers[1:, 1:], numbers[1:, :-1], numbers[:-1, 1:]):
        pair = np.corrcoef(numbers[:-1, :-1].ravel(), shifted.ravel())
        assert abs(pair[0, 1]) < 0.01


def test_seeds_do_not_give_shifted_copies_of_one_sequence() -> None:
    numbers = grid(500, 200)
    assert len(np.unique(numbers)) == numbers.size
