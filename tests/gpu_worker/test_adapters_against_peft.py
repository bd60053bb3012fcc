"""Adapters of every kind against PEFT, in fp32 and token for token, through whole steps."""

import contextlib
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel

from gpu_worker.worker import Worker
from pipeline.messages import AdapterMove, PlaceAdapter
from tests.gpu_worker.driving import Driver, make_worker, prompt
from tests.gpu_worker.packing import Packed, arena_of
from tests.gpu_worker.tiny import ADAPTERS

SLOT_OF = {name: slot for slot, name in enumerate(ADAPTERS)}
KINDS = [None, *ADAPTERS]  # None is the base model


def expected(model: PeftModel, adapter: str | None, tokens: list[int], count: int) -> list[int]:
    """Greedy tokens of PEFT, by whole forward passes."""
    tokens = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(_logits(model, adapter, tokens).argmax()))
    return tokens[-count:]


def _logits(model: PeftModel, adapter: str | None, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    if adapter is not None:
        model.set_adapter(adapter)
    with model.disable_adapter() if adapter is None else contextlib.nullcontext():
        logits: torch.Tensor = model(ids).logits[0, -1]
    return logits


def slot(adapter: str | None) -> int:
    return -1 if adapter is None else SLOT_OF[adapter]


@pytest.mark.parametrize("adapter", KINDS)
def test_alone(worker: Worker, peft_llama: PeftModel, adapter: str | None) -> None:
    driver = Driver(worker)
    row = driver.add(2, prompt(1, 21), slot=slot(adapter))
    driver.generate([2], 16)
    assert row.produced == expected(peft_llama, adapter, prompt(1, 21), 16)


def test_the_adapters_change_the_reply(peft_llama: PeftModel) -> None:
    """Else the tests here would show nothing."""
    replies = [tuple(expected(peft_llama, kind, prompt(1, 21), 16)) for kind in KINDS]
    assert len(set(replies)) == len(KINDS)


@pytest.mark.parametrize("kernels", ["grouped", "reference"])
def test_all_together_in_one_batch(
    llama_folder: Path, packed_adapters: list[Packed], peft_llama: PeftModel, kernels: str
) -> None:
    worker = make_worker(llama_folder, lora_kernels=kernels)
    arena, copies = arena_of(packed_adapters)
    worker.attach_arena(arena)
    driver = Driver(worker)
    driver.step(copies=copies)
    kinds = [KINDS[row % len(KINDS)] for row in range(8)]
    for row, kind in enumerate(kinds):
        driver.add(row, prompt(row, 5 + 3 * row), slot=slot(kind))
    driver.generate(range(8), 12)
    for row, kind in enumerate(kinds):
        assert driver.rows[row].produced == expected(peft_llama, kind, prompt(row, 5 + 3 * row), 12)


def test_arrivals_at_different_times_with_chunks_of_seven(
    worker: Worker, peft_llama: PeftModel
) -> None:
    driver = Driver(worker)
    decoding: list[int] = []
    for row in range(8):
        driver.add(row, prompt(row, 17), slot=slot(KINDS[row % len(KINDS)]))
        for chunk in (7, 7, 3):
            driver.step(decode=decoding, prefill=[(row, chunk)])
        decoding.insert(0, row)
    for row in range(8):
        produced = driver.rows[row].produced
        kind = KINDS[row % len(KINDS)]
        assert produced == expected(peft_llama, kind, prompt(row, 17), len(produced))


def test_after_a_prefix_hit(worker: Worker, peft_llama: PeftModel) -> None:
    driver = Driver(worker)
    shared = prompt(1, 12)
    driver.add(0, shared + prompt(2, 5), slot=0)
    driver.generate([0], 5)
    donor = driver.free(0, keep_blocks=True)

    hit = driver.add(1, shared + prompt(3, 6), slot=0, cached_blocks=donor.blocks[:3])
    driver.generate([1], 12)
    assert hit.new.cached_tokens == 12
    assert hit.produced == expected(peft_llama, "all_linear", shared + prompt(3, 6), 12)


def test_after_a_preemption(worker: Worker, peft_llama: PeftModel) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, 10), slot=2)
    driver.generate([0], 6)
    preempted = driver.free(0)
    driver.add(5, prompt(4, 30))
    driver.generate([5], 3)

    replayed = driver.add(3, preempted.tokens, slot=2, prompt_tokens=10)
    driver.generate([3], 10)
    assert replayed.produced == expected(peft_llama, "uneven", prompt(1, 10), 16)


def test_a_slot_that_is_given_again_has_the_new_adapter(
    worker: Worker, packed_adapters: list[Packed], peft_llama: PeftModel
) -> None:
    driver = Driver(worker)
    for row, kind in enumerate(("all_linear", "query_value")):
        driver.add(row, prompt(row, 8), slot=slot(kind))
    driver.generate([0, 1], 4)
    driver.free(0)
    driver.free(1)

    arena, copies = arena_of([packed_adapters[2], packed_adapters[0]])
    worker.attach_arena(arena)
    driver.step(copies=copies)
    for row in range(2):
        driver.add(row, prompt(row, 8), slot=row)
    driver.generate([0, 1], 8)
    assert driver.rows[0].produced == expected(peft_llama, "uneven", prompt(0, 8), 8)
    assert driver.rows[1].produced == expected(peft_llama, "all_linear", prompt(1, 8), 8)


def test_an_adapter_may_be_placed_right_before_the_step_that_uses_it(
    llama_folder: Path, packed_adapters: list[Packed], peft_llama: PeftModel
) -> None:
    worker = make_worker(llama_folder)
    arena, copies = arena_of(packed_adapters)
    worker.attach_arena(arena)
    driver = Driver(worker)
    driver.add(0, prompt(1, 9), slot=2)
    first = driver.step(prefill=[(0, 9)], copies=copies[2:]).tokens[0]
    assert [first] == expected(peft_llama, "uneven", prompt(1, 9), 1)


def test_it_says_once_and_in_order_which_adapters_have_been_placed(
    llama_folder: Path, packed_adapters: list[Packed]
) -> None:
    worker = make_worker(llama_folder)
    arena, copies = arena_of(packed_adapters)
    worker.attach_arena(arena)
    for copy in reversed(copies):
        worker.place(PlaceAdapter(copy))
    assert worker.adapters.is_placing
    while worker.advance(0):
        pass
    assert worker.adapters.placed() == [2, 1, 0]
    assert not worker.adapters.is_placing
    assert worker.adapters.placed() == []


def test_an_adapter_can_be_moved_while_it_is_used(
    llama_folder: Path, peft_llama: PeftModel, packed_adapters: list[Packed]
) -> None:
    worker = make_worker(llama_folder)
    arena, copies = arena_of(packed_adapters)
    worker.attach_arena(arena)
    driver = Driver(worker)
    first, other, _ = copies
    driver.add(0, prompt(1, 9), slot=0)
    driver.step(prefill=[(0, 9)], copies=(replace(first, pool_offset=4096),))
    driver.step(decode=[0])
    move = AdapterMove(0, 4096, 256, first.nbytes, in_use=True)
    over_its_end = replace(other, pool_offset=256 + first.nbytes)
    worker.place(PlaceAdapter(over_its_end, (move,)))
    driver.add(1, prompt(2, 5), slot=1)
    driver.step(decode=[0], prefill=[(1, 5)])
    for _ in range(3):
        driver.step(decode=[0, 1])
    assert driver.rows[0].produced == expected(peft_llama, "all_linear", prompt(1, 9), 6)
    assert driver.rows[1].produced == expected(peft_llama, "query_value", prompt(2, 5), 4)
