"""What a worker does beside computing the right tokens."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.build import build_worker
from gpu_worker.figures import Figures
from gpu_worker.worker import Worker
from pipeline.config import Settings
from pipeline.messages import Logprobs, PlaceAdapter, Sampling, Step
from tests.gpu_worker.driving import Driver, ints, prompt
from tests.gpu_worker.packing import Packed, arena_of, pack, random_weights


@pytest.fixture
def driver(worker: Worker) -> Driver:
    return Driver(worker)


def poison(driver: Driver, slot: int) -> None:
    """An adapter whose activations overflow."""
    adapters = driver.worker.adapters
    assert isinstance(adapters, AdapterPool)
    shapes = adapters.shapes
    weights = random_weights(ranks=[2] * 21, shapes=shapes, std=1e25)
    arena, (copy,) = arena_of([pack(weights, layers=3, shapes=shapes)])
    driver.worker.attach_arena(arena)
    driver.step(copies=(type(copy)(slot, 2 << 20, 0, copy.nbytes, copy.ranks),))


def test_a_step_without_rows_is_answered(worker: Worker) -> None:
    done = worker.run(Step(3, free_rows=ints([0, 1])))
    assert (done.step_id, done.token_ids, done.logprobs) == (3, b"", b"")


def test_a_chunk_inside_its_prompt_gives_no_token(driver: Driver) -> None:
    driver.add(0, prompt(1, 9))
    assert driver.step(prefill=[(0, 5)]).done.token_ids == b""
    assert list(driver.step(prefill=[(0, 4)]).tokens) == [0]


def test_logprobs_come_in_the_order_of_the_tokens_if_a_row_wants_them(driver: Driver) -> None:
    driver.add(0, prompt(1, 9))
    driver.add(1, prompt(2, 5), logprobs=Logprobs())
    assert driver.prefill_all([0]).done.logprobs == b""
    result = driver.step(decode=[0], prefill=[(1, 5)])
    assert len(result.done.logprobs) == 4
    [(logprob, _)] = driver.rows[1].logprobs
    assert logprob < 0
    assert driver.rows[0].logprobs == []


def test_a_row_that_is_not_finite_gets_minus_one_and_its_neighbours_their_tokens(
    driver: Driver,
) -> None:
    for row in range(3):
        driver.add(row, prompt(row, 9), slot=(-1, 0, 1)[row])
    driver.generate(range(3), 4)
    expected = [driver.free(row).produced for row in range(3)]

    poison(driver, slot=9)
    for row in range(3):
        driver.add(row, prompt(row, 9), slot=(-1, 0, 1)[row])
    driver.add(3, prompt(3, 9), slot=9)
    driver.prefill_all([3, 0, 1, 2])
    for _ in range(3):  # the surplus steps that are in flight when the -1 is noticed
        driver.step(decode=[0, 3, 1, 2])
    assert driver.rows[3].produced == [-1] * 4
    assert [driver.rows[row].produced for row in range(3)] == expected


def test_what_a_sequence_that_was_not_finite_leaves_in_its_blocks_harms_nobody(
    driver: Driver,
) -> None:
    driver.add(0, prompt(1, 6))
    driver.generate([0], 4)
    expected = driver.free(0).produced

    poison(driver, slot=9)
    driver.free_blocks = driver.free_blocks[-4:]  # all of them are to be spoiled
    driver.add(0, prompt(2, 16), slot=9)
    driver.prefill_all([0])
    driver.free(0)
    driver.add(0, prompt(1, 6))
    driver.generate([0], 4)
    assert driver.rows[0].produced == expected


def test_freed_and_taken_again_within_a_step(driver: Driver) -> None:
    driver.add(0, prompt(1, 6))
    driver.generate([0], 4)
    expected = driver.free(0).produced
    driver.add(0, prompt(2, 11), slot=0)
    driver.generate([0], 2)
    driver.free(0)
    driver.add(0, prompt(1, 6))
    driver.generate([0], 4)
    assert driver.rows[0].produced == expected


def test_sampling_does_not_depend_on_who_shares_the_batch(driver: Driver) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=11)
    driver.add(0, prompt(1, 6), slot=1, sampling=sampling)
    driver.generate([0], 12)
    alone = driver.free(0).produced
    driver.add(4, prompt(1, 6), slot=1, sampling=sampling)
    for row in (0, 1, 2, 3, 5):
        driver.add(row, prompt(row, 6), slot=row % 3, sampling=Sampling(seed=row))
    driver.generate(range(6), 12)
    assert driver.rows[4].produced == alone


def test_a_step_that_contradicts_the_row_table_is_an_error(worker: Worker) -> None:
    with pytest.raises(ValueError, match="no sequence has"):
        worker.run(Step(1, decode_rows=ints([2])))


def test_a_row_without_a_block_for_its_token_is_an_error(driver: Driver) -> None:
    driver.add(0, prompt(1, 4))
    driver.prefill_all([0])
    with pytest.raises(ValueError, match="no block"):
        driver.worker.run(Step(9, decode_rows=ints([0])))


def test_figures_count_steps_tokens_and_copies(
    llama_folder: Path, packed_adapters: list[Packed]
) -> None:
    registry = CollectorRegistry()
    worker = build_worker(Settings(device="cpu"), llama_folder, Figures(registry)).worker
    arena, copies = arena_of(packed_adapters)
    worker.attach_arena(arena)
    driver = Driver(worker, block_tokens=16)
    driver.step(copies=copies)
    driver.add(0, prompt(1, 6))
    driver.generate([0], 4)
    while worker.advance(0):
        pass
    assert worker.placed() == [0, 1, 2]

    values = {s.name + str(s.labels or ""): s.value for f in registry.collect() for s in f.samples}
    assert values["loradex_step_seconds_count"] == 4
    assert values["loradex_fed_tokens_total{'phase': 'prefill'}"] == 6
    assert values["loradex_fed_tokens_total{'phase': 'decode'}"] == 3
    assert values["loradex_sampled_tokens_total"] == 4
    assert values["loradex_adapter_copies_total"] == 3
    busy, idle = (values[f"loradex_decode_{what}_seconds_total"] for what in ("busy", "idle"))
    assert 0 < busy < values["loradex_step_seconds_sum"]
    assert idle > 0
    assert values["loradex_adapter_copied_bytes_total"] == len(arena)


def test_a_worker_that_starts_over_holds_nothing_and_gives_the_same_tokens(
    llama_folder: Path, packed_adapters: list[Packed]
) -> None:
    settings = Settings(device="cpu", kv_cache_bytes=1_000_000, kv_block_tokens=4, rows=4)
    built = build_worker(settings, llama_folder, Figures(CollectorRegistry()))
    worker = built.worker
    arena, copies = arena_of(packed_adapters)
    worker.attach_arena(arena)
    replies = []
    for _ in range(2):
        driver = Driver(worker, blocks=range(50), block_tokens=4)
        driver.step(copies=copies)
        rows = [driver.add(row, prompt(row, 9), slot=row - 1) for row in range(3)]
        driver.generate(range(3), 5)
        replies.append([row.produced for row in rows])
        worker.launch(Step(99, decode_rows=ints([0]), block_rows=ints([0]), blocks=ints([49])))
        before = worker.grammars
        worker.start_over(built.new_grammars())
        assert worker.grammars is not before
        assert not worker.rows.length.any()
        assert not worker.adapters.adapters
        assert not worker.adapters.is_placing
    assert replies[0] == replies[1]


def test_what_was_being_copied_is_forgotten_by_a_worker_that_starts_over(
    llama_folder: Path, packed_adapters: list[Packed]
) -> None:
    built = build_worker(Settings(device="cpu"), llama_folder, Figures(CollectorRegistry()))
    arena, copies = arena_of(packed_adapters)
    built.worker.attach_arena(arena)
    for copy in copies:
        built.worker.place(PlaceAdapter(copy))
    built.worker.start_over(built.new_grammars())
    assert not built.worker.advance(1.0)
    assert built.worker.placed() == []
