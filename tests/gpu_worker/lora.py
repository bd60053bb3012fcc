"""Random adapters as the kernels are given them."""

from collections.abc import Sequence

import torch

from gpu_worker.adapter_pool import AdapterPool
from pipeline.adapter_layout import MODULES, ModuleShape
from pipeline.messages import PlaceAdapter
from tests.gpu_worker.packing import Packed, arena_of, pack, random_weights

CPU = torch.device("cpu")


def make_shapes(hidden: int = 32, kv: int = 16, intermediate: int = 48) -> tuple[ModuleShape, ...]:
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return tuple(ModuleShape(*sizes[name]) for name in MODULES)


def make_pool(
    ranks: Sequence[Sequence[int]],
    *,
    shapes: Sequence[ModuleShape],
    dtype: torch.dtype = torch.float32,
) -> AdapterPool:
    """ranks[slot] is [layers * modules] of the adapter in that slot."""
    packed: list[Packed] = []
    for seed, of_adapter in enumerate(ranks):
        weights = random_weights(ranks=of_adapter, shapes=shapes, seed=seed)
        layers = len(of_adapter) // len(MODULES)
        packed.append(pack(weights, layers=layers, shapes=shapes, dtype=dtype))
    arena, copies = arena_of(packed)
    pool = AdapterPool(nbytes=max(16, len(arena)), shapes=tuple(shapes), dtype=dtype, device=CPU)
    pool.attach_arena(arena)
    for copy in copies:
        pool.place(PlaceAdapter(copy))
    finish(pool)
    return pool


def finish(pool: AdapterPool) -> None:
    """Let all come in that is on its way."""
    while pool.advance(0):
        pass
