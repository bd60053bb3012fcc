"""Stacked matrices, and how long they are kept."""

import torch
from torch import Tensor

from gpu_worker.kernels import Adapter
from gpu_worker.kernels.stacks import StackCache, make_stack
from pipeline.adapter_layout import MODULES
from tests.gpu_worker.lora import make_pool, make_shapes

RANKS = [4] * len(MODULES)


def make_adapters(count: int) -> list[Adapter]:
    pool = make_pool([RANKS] * count, shapes=make_shapes())
    return [pool.adapters[slot] for slot in range(count)]


def test_a_stack_holds_every_matrix_with_its_owner() -> None:
    mixed = [2, 0, 3, 0, 5, 0, 1]
    pool = make_pool([RANKS, mixed], shapes=make_shapes())
    adapters = [pool.adapters[0], pool.adapters[1]]
    stack = make_stack(adapters)
    assert stack.adapter_bytes == sum(adapter.nbytes for adapter in adapters)
    for group, stacked in enumerate(stack.groups[0]):
        assert stacked is not None
        owner = torch.from_numpy(stack.owners[stacked.owners])
        lora_a = stacked.lora_a(torch.eye(adapters[0].groups[0][group].lora_a.shape[1])).T
        lora_b = stacked.lora_b(torch.eye(len(owner))).T
        for position, adapter in enumerate(adapters):
            own = adapter.groups[0][group]
            assert torch.equal(lora_a[owner == position], own.lora_a)
            diagonal: Tensor = torch.block_diag(*own.lora_b)  # type: ignore[no-untyped-call]
            assert torch.equal(lora_b[:, owner == position], diagonal)


def test_a_group_that_nobody_has_is_empty() -> None:
    query_only = [2, 0, 0, 0, 0, 0, 0]
    pool = make_pool([query_only, query_only], shapes=make_shapes())
    stack = make_stack([pool.adapters[0], pool.adapters[1]])
    assert [group is None for group in stack.groups[0]] == [False, True, True, True]


def test_the_same_set_is_stacked_once() -> None:
    one, two, three = make_adapters(3)
    cache = StackCache(10**9)
    stack = cache.get([one, two])
    assert cache.get([two, one]) is stack
    assert cache.get([two, three]) is not stack


def test_a_part_of_a_stacked_set_uses_its_stack_unless_that_wastes_half() -> None:
    adapters = make_adapters(5)
    cache = StackCache(10**9)
    stack = cache.get(adapters)
    assert cache.get(adapters[:3]) is stack
    assert cache.get(adapters[:2]).versions == (adapters[0].version, adapters[1].version)


def test_stacks_that_were_not_used_for_longest_make_room() -> None:
    one, two, three, four = make_adapters(4)
    cache = StackCache(2 * make_stack([one, two]).nbytes)
    first, second = cache.get([one, two]), cache.get([three, four])
    assert cache.get([one, two]) is first
    third = cache.get([one, three])  # in place of the second
    assert cache.get([one, two]) is first
    assert cache.get([one, three]) is third
    assert cache.get([three, four]) is not second


def test_a_stack_beyond_the_memory_is_made_and_not_kept() -> None:
    adapters = make_adapters(2)
    cache = StackCache(1)
    assert cache.get(adapters) is not cache.get(adapters)
