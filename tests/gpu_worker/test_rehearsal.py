"""Steps before the first that counts."""

import numpy as np
import pytest

from gpu_worker import rehearsal
from gpu_worker.worker import Worker
from pipeline.messages import Step
from tests.gpu_worker.driving import BLOCK_TOKENS, ROWS, Driver, ints, prompt


def steps(tokens: int, rows: int = ROWS) -> list[Step]:
    return list(rehearsal.steps(tokens=tokens, block_tokens=BLOCK_TOKENS, rows=rows))


@pytest.mark.parametrize("most", [1, 2, 15, 16, 17, 100, 8192])
def test_lengths_rise_to_the_most_and_have_both_sorts_of_every_power_of_two(most: int) -> None:
    found = rehearsal.lengths(most)
    assert found == sorted(set(found))
    assert found[0] == 1
    assert found[-1] == most
    for length in found[1:-1]:
        if length % 16 == 0 and 2 * length <= most:
            assert any(length < other < 2 * length and other % 16 for other in found)


@pytest.mark.parametrize(("tokens", "rows"), [(2, 1), (64, 1), (64, 8), (300, 8)])
def test_no_step_is_larger_than_a_step_may_be(tokens: int, rows: int) -> None:
    for step in steps(tokens, rows):
        chunks = np.frombuffer(step.prefill, np.int32).reshape(-1, 3)
        fed = int(chunks[:, 2].sum()) + len(step.decode_rows) // 4
        assert fed <= tokens
        assert all(new.row < rows for new in step.new_rows)


def test_a_worker_is_as_new_after_a_rehearsal(worker: Worker) -> None:
    produced = []
    for _ in range(2):
        driver = Driver(worker)
        driver.add(0, prompt(0, 9), slot=0)
        driver.generate([0], 6)
        produced.append(driver.rows[0].produced)
        worker.rehearse(Step(0, free_rows=ints([0])))
        for step in steps(64):
            worker.rehearse(step)
        assert not worker.rows.length.any()
    assert produced[0] == produced[1]


def test_a_rehearsal_is_not_counted(worker: Worker) -> None:
    before = counted(worker)
    for step in steps(32):
        worker.rehearse(step)
    assert counted(worker) == before
    Driver(worker).add(0, prompt(0, 9))
    worker.run(next(iter(steps(32))))
    assert counted(worker) != before


def counted(worker: Worker) -> list[float]:
    figures = worker._figures
    counters = (figures.prefill_tokens, figures.decode_tokens, figures.sampled_tokens)
    return [one._value.get() for one in counters]
