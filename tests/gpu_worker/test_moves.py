"""Moving bytes, and adapters that are moved in the pool as the scheduler's pool says."""

import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.moves import move_down
from pipeline.adapter_layout import MODULES
from pipeline.messages import AdapterCopy, AdapterKey, AdapterMove, PlaceAdapter
from scheduler.adapter_pool import ALIGNMENT, Extent, Place
from scheduler.adapter_pool import AdapterPool as Planner
from tests.gpu_worker.lora import CPU, finish, make_shapes
from tests.gpu_worker.packing import arena_of, pack, random_weights

SHAPES = make_shapes(hidden=8, kv=4, intermediate=12)
RANKS = [[rank] * len(MODULES) for rank in (1, 2, 3, 5, 8, 13)]
WEIGHTS = [
    random_weights(ranks=ranks, shapes=SHAPES, seed=seed) for seed, ranks in enumerate(RANKS)
]
PACKED = [pack(weights, layers=1, shapes=SHAPES) for weights in WEIGHTS]
LARGEST = len(PACKED[-1].data)


@given(
    nbytes=st.integers(0, 60),
    target=st.integers(0, 30),
    shift=st.integers(0, 70),
    scratch=st.integers(1, 70),
)
def test_bytes_arrive_whatever_overlaps(nbytes: int, target: int, shift: int, scratch: int) -> None:
    memory = torch.randint(0, 256, (160,), dtype=torch.uint8)
    expected = memory.clone()
    expected[target : target + nbytes] = memory[target + shift : target + shift + nbytes]
    scratch_memory = torch.empty(scratch, dtype=torch.uint8)
    move_down(memory, target + shift, target, nbytes, scratch_memory)
    assert torch.equal(memory, expected)


def test_bytes_are_not_moved_up() -> None:
    with pytest.raises(ValueError, match="moved up"):
        move_down(torch.zeros(8), 0, 1, 4, torch.zeros(1))


class Resident(NamedTuple):
    kind: int  # of PACKED
    extent: Extent


class Pools:
    """The scheduler's idea of the pool and the worker's, and what should be in it."""

    def __init__(self, units: int, slots: int) -> None:
        self.nbytes = units * ALIGNMENT
        self.planner = Planner(nbytes=self.nbytes, slots=slots)
        self.slots = slots
        arena, self._copies = arena_of(PACKED)
        self.pool = AdapterPool(nbytes=self.nbytes, shapes=SHAPES, dtype=torch.float32, device=CPU)
        self.pool.attach_arena(arena)
        self.resident: dict[str, Resident] = {}
        self._names = 0

    def load(self, kind: int, idle: list[str], fixed: list[str]) -> bool:
        """Place an adapter; the idle ones may go, in this order, and the fixed ones not move."""
        evictable = [self.resident[name].extent for name in idle]
        walls = [self.resident[name].extent for name in fixed]
        nbytes = len(PACKED[kind].data)
        self._names += 1
        name = str(self._names)
        place = self.planner.place(AdapterKey("local", name), nbytes, evictable, fixed=walls)
        if place is None:
            return False
        assert {move.extent for move in place.moves}.isdisjoint(walls)
        for gone in place.evicted:
            assert gone in evictable
            del self.resident[gone.key.id]
        self.pool.place(self._message(kind, place))
        self.resident[name] = Resident(kind, place.extent)
        return True

    def _message(self, kind: int, place: Place) -> PlaceAdapter:
        moves = tuple(
            AdapterMove(
                slot=extent.slot,
                from_offset=from_offset,
                to_offset=extent.offset,
                nbytes=extent.end - extent.offset,
                in_use=False,
            )
            for extent, from_offset in place.moves
        )
        copy, extent = self._copies[kind], place.extent
        return PlaceAdapter(
            AdapterCopy(extent.slot, extent.offset, copy.arena_offset, copy.nbytes, copy.ranks),
            moves,
        )

    def check(self) -> None:
        """Everybody has its room, and its matrices."""
        finish(self.pool)
        end = 0
        for _, extent in sorted(self.resident.values(), key=lambda one: one.extent.offset):
            assert end <= extent.offset
            end = extent.end
        assert end <= self.nbytes
        slots = [extent.slot for _, extent in self.resident.values()]
        assert len(set(slots)) == len(slots) <= self.slots
        for kind, extent in self.resident.values():
            for group, module in ((1, 3), (3, 6)):  # groups of one module
                lora_a, lora_b = WEIGHTS[kind][0, module]
                shown = self.pool.adapters[extent.slot].groups[0][group]
                assert torch.equal(shown.lora_a, lora_a)
                assert torch.equal(shown.lora_b[0], lora_b)


@settings(max_examples=150, deadline=None)
@given(
    units=st.integers(LARGEST // ALIGNMENT + 1, 3 * LARGEST // ALIGNMENT),
    slots=st.integers(1, 12),
    seed=st.randoms(use_true_random=False),
)
def test_no_adapter_is_lost_and_each_gets_in_if_there_is_enough_room(
    units: int, slots: int, seed: random.Random
) -> None:
    pools = Pools(units, slots)
    for _ in range(30):
        kind = seed.randrange(len(PACKED))
        names = list(pools.resident)
        idle = [name for name in names if seed.random() < 0.4]
        seed.shuffle(idle)
        fixed = [name for name in names if name not in idle and seed.random() < 0.3]
        kept = sum(
            one.end - one.offset
            for one in (pools.resident[name].extent for name in names if name not in idle)
        )
        size = -(-len(PACKED[kind].data) // ALIGNMENT) * ALIGNMENT
        enough = kept + size <= pools.nbytes and (len(names) < slots or idle)
        loaded = pools.load(kind, idle, fixed)
        assert enough or not loaded
        if not fixed:
            assert loaded == bool(enough)
        pools.check()
