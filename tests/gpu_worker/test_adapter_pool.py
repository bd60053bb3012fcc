"""Adapters in the pool: what a slot shows is what was packed."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.adapter_pool import PIECE_BYTES, AdapterPool
from gpu_worker.kernels.segments import Segment
from pipeline.adapter_layout import GROUPS, MODULES, pack_ranks
from pipeline.messages import AdapterCopy, PlaceAdapter
from tests.gpu_worker.lora import CPU, finish, make_pool, make_shapes
from tests.gpu_worker.packing import arena_of, pack, random_weights

LAYERS = 2
SHAPES = make_shapes()


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(
        st.integers(0, 5), min_size=LAYERS * len(MODULES), max_size=LAYERS * len(MODULES)
    ),
    hidden=st.sampled_from([8, 5]),  # 5: the As of a group do not follow each other
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_slot_shows_the_matrices_that_were_packed(
    ranks: list[int], hidden: int, dtype: torch.dtype
) -> None:
    shapes = make_shapes(hidden=hidden, kv=6, intermediate=7)
    adapter = make_pool([ranks], shapes=shapes, dtype=dtype).adapters[0]
    weights = random_weights(ranks=ranks, shapes=shapes, seed=0)
    for layer in range(LAYERS):
        for group, modules in enumerate(GROUPS):
            lora_a, lora_b = adapter.groups[layer][group]
            rank = 0
            for module, b in zip(modules, lora_b, strict=True):
                assert b.shape == (shapes[module].out_features, ranks[layer * 7 + module])
                if b.shape[1]:
                    a_packed, b_packed = weights[layer, module]
                    assert torch.equal(lora_a[rank : rank + b.shape[1]], a_packed.to(dtype))
                    assert torch.equal(b, b_packed.to(dtype))
                rank += b.shape[1]
            assert lora_a.shape == (rank, shapes[modules[0]].in_features)


def test_the_matrices_are_views_of_the_pool() -> None:
    shapes = make_shapes()
    pool = make_pool([[4] * len(MODULES)], shapes=shapes)
    start = pool.adapters[0].groups[0][0].lora_a.untyped_storage().data_ptr()
    for group in pool.adapters[0].groups[0]:
        for matrix in (group.lora_a, *group.lora_b):
            assert matrix.untyped_storage().data_ptr() == start


def test_a_slot_that_is_given_again_is_another_version() -> None:
    ranks = [2] * len(MODULES)
    packed = [
        pack(random_weights(ranks=ranks, shapes=SHAPES, seed=seed), layers=1, shapes=SHAPES)
        for seed in range(2)
    ]
    arena, (first, second) = arena_of(packed)
    pool = AdapterPool(nbytes=len(arena), shapes=SHAPES, dtype=torch.float32, device=CPU)
    pool.attach_arena(arena)
    pool.place(PlaceAdapter(first))
    finish(pool)
    before = pool.adapters[0]
    again = AdapterCopy(0, 0, second.arena_offset, second.nbytes, second.ranks)
    pool.place(PlaceAdapter(again))
    finish(pool)
    after = pool.adapters[0]
    assert before.version != after.version
    expected, _ = random_weights(ranks=ranks, shapes=SHAPES, seed=1)[0, 3]
    assert torch.equal(after.groups[0][1].lora_a, expected)


def test_a_copy_before_the_arena_or_of_the_wrong_size_is_an_error() -> None:
    pool = AdapterPool(nbytes=64, shapes=SHAPES, dtype=torch.float32, device=CPU)
    copy = AdapterCopy(0, 0, 0, 16, pack_ranks([0] * len(MODULES)))
    with pytest.raises(ValueError, match="before the arena"):
        pool.place(PlaceAdapter(copy))
    pool.attach_arena(mmap.mmap(-1, 64))
    with pytest.raises(ValueError, match="16 bytes for an adapter of 0"):
        pool.place(PlaceAdapter(copy))


LARGE_SHAPES = make_shapes(hidden=1024, kv=16, intermediate=16)
LARGE_RANKS = [512] + [0] * 6


def placing(count: int) -> AdapterPool:
    """A pool that has been told of so many adapters, each larger than a piece."""
    weights = [
        random_weights(ranks=LARGE_RANKS, shapes=LARGE_SHAPES, seed=seed) for seed in range(count)
    ]
    packed = [pack(one, layers=1, shapes=LARGE_SHAPES) for one in weights]
    assert len(packed[0].data) > PIECE_BYTES
    arena, copies = arena_of(packed)
    pool = AdapterPool(nbytes=len(arena), shapes=LARGE_SHAPES, dtype=torch.float32, device=CPU)
    pool.attach_arena(arena)
    for copy in copies:
        pool.place(PlaceAdapter(copy))
    return pool


def test_large_adapters_come_in_piece_by_piece_and_in_order() -> None:
    pool = placing(2)
    pieces, placed = 0, []
    while pool.advance(0):
        pieces += 1
        placed.append(pool.placed())
    assert pieces > 2
    assert [slot for slots in placed for slot in slots] == [0, 1]
    assert placed[0] == []
    assert not pool.is_placing


def test_a_step_finds_its_adapter_whole_and_waits_for_none_behind_it() -> None:
    pool = placing(3)
    assert pool.arrivals([Segment(0, 1, 1)]) is None
    assert pool.placed() == [0, 1]
    assert pool.is_placing
    expected, _ = random_weights(ranks=LARGE_RANKS, shapes=LARGE_SHAPES, seed=1)[0, 0]
    assert torch.equal(pool.adapters[1].groups[0][0].lora_a, expected)


def test_steps_of_others_wait_for_no_adapter() -> None:
    pool = placing(1)
    assert pool.arrivals([Segment(0, 1, 7)]) is None
    assert pool.placed() == []
