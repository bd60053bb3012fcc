"""Whatever the schedule, a sequence gets what it would get alone (random test)."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.worker import Worker
from pipeline.messages import PlaceAdapter, Sampling
from tests.gpu_worker.driving import BLOCK_TOKENS, ROWS, Driver, make_worker, prompt
from tests.gpu_worker.packing import Packed, arena_of
from tests.gpu_worker.tiny import make_model

BLOCKS = 120
SEQUENCES = [  # prompt, slot, how it is sampled
    (prompt(1, 19), -1, Sampling(temperature=0.0)),
    (prompt(2, 7), 0, Sampling(temperature=0.0)),
    (prompt(3, 26), 1, Sampling(temperature=1.0, top_p=0.9, seed=5)),
    (prompt(3, 26)[:13] + prompt(4, 8), 1, Sampling(temperature=0.7, top_k=9, seed=2**64 - 1)),
    (prompt(5, 11), 2, Sampling(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.5)),
    (prompt(6, 1), 2, Sampling(temperature=1.3, typical_p=0.8, frequency_penalty=0.3, seed=7)),
]
PRODUCED = 10


@pytest.fixture(scope="module")
def workers(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, packed_adapters: list[Packed]
) -> dict[str, Worker]:
    """With and without a sliding window; the adapters fit both."""
    windowed = tmp_path_factory.mktemp("mistral")
    make_model(windowed, "mistral")
    made = {"llama": make_worker(llama_folder), "mistral": make_worker(windowed)}
    for worker in made.values():
        arena, copies = arena_of(packed_adapters)
        worker.attach_arena(arena)
        for copy in copies:
            worker.place(PlaceAdapter(copy))
    return made


@pytest.fixture(scope="module")
def alone(workers: dict[str, Worker]) -> dict[str, list[list[int]]]:
    """What each sequence produces when nobody else runs."""
    replies: dict[str, list[list[int]]] = {}
    for name, worker in workers.items():
        driver = Driver(worker, blocks=range(BLOCKS))
        replies[name] = []
        for tokens, slot, sampling in SEQUENCES:
            driver.add(0, tokens, slot=slot, sampling=sampling)
            driver.generate([0], PRODUCED)
            replies[name].append(driver.free(0).produced)
    return replies


class Schedule:
    """Random decisions of a scheduler."""

    def __init__(self, worker: Worker, choose: random.Random) -> None:
        self._choose = choose
        self._driver = Driver(worker, blocks=choose.sample(range(BLOCKS), BLOCKS))
        self._sequence_of: dict[int, int] = {}  # by row
        self._waiting = {number: list(tokens) for number, (tokens, _, _) in enumerate(SEQUENCES)}
        self._kept: dict[tuple[int, tuple[int, ...]], int] = {}  # whole blocks, by what they hold
        self.produced: dict[int, list[int]] = {}
        self.hits = 0

    def run(self) -> None:
        while self._waiting or self._sequence_of:
            if self._waiting and (not self._sequence_of or self._choose.random() < 0.5):
                self._start(self._choose.choice(sorted(self._waiting)))
            if self._sequence_of and self._choose.random() < 0.1:
                self._preempt(self._choose.choice(sorted(self._sequence_of)))
            self._step()

    def _start(self, number: int) -> None:
        prompt_tokens, slot, sampling = SEQUENCES[number]
        row = self._choose.choice(sorted(set(range(ROWS)) - self._sequence_of.keys()))
        tokens = self._waiting.pop(number)
        new = self._driver.add(
            row,
            tokens,
            slot=slot,
            sampling=sampling,
            prompt_tokens=len(prompt_tokens),
            cached_blocks=self._cached(slot, tokens),
        ).new
        self.hits += new.cached_tokens > 0
        self._sequence_of[row] = number

    def _cached(self, slot: int, tokens: list[int]) -> list[int]:
        """Kept blocks of an equal beginning, short of the last token."""
        blocks = []
        for end in range(BLOCK_TOKENS, len(tokens), BLOCK_TOKENS):
            block = self._kept.get((slot, tuple(tokens[:end])))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _preempt(self, row: int) -> None:
        number = self._sequence_of.pop(row)
        self._waiting[number] = self._free(row)

    def _free(self, row: int) -> list[int]:
        """Keeps the whole blocks, and gives the others back."""
        state = self._driver.free(row, keep_blocks=True)
        for index, block in enumerate(state.blocks):
            end = (index + 1) * BLOCK_TOKENS
            key = (state.new.slot, tuple(state.tokens[:end]))
            if end > state.computed or self._kept.setdefault(key, block) != block:
                self._driver.free_blocks.append(block)
        return state.tokens

    def _step(self) -> None:
        decode, prefill = [], []
        for row in self._choose.sample(sorted(self._sequence_of), len(self._sequence_of)):
            state = self._driver.rows[row]
            missing = len(state.tokens) - state.computed
            if self._choose.random() < 0.2:
                continue  # sits this step out
            if len(state.tokens) > state.given:
                decode.append(row)
            else:
                prefill.append((row, self._choose.randint(1, missing)))
        self._driver.step(decode=decode, prefill=prefill)
        for row, number in list(self._sequence_of.items()):
            if len(self._driver.rows[row].produced) >= PRODUCED:
                del self._sequence_of[row]
                tokens = self._free(row)
                self.produced[number] = tokens[len(SEQUENCES[number][0]) :]


@pytest.mark.parametrize("name", ["llama", "mistral"])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_sequence_gets_the_same_tokens_in_any_schedule(
    name: str, seed: int, workers: dict[str, Worker], alone: dict[str, list[list[int]]]
) -> None:
    schedule = Schedule(workers[name], random.Random(seed))
    schedule.run()
    assert [schedule.produced[number] for number in range(len(SEQUENCES))] == alone[name]


def test_the_schedules_do_hit_prefixes(workers: dict[str, Worker]) -> None:
    schedules = [Schedule(workers["llama"], random.Random(seed)) for seed in range(5)]
    for schedule in schedules:
        schedule.run()
    assert sum(schedule.hits for schedule in schedules) > 3
