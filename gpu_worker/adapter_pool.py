"""The adapter pool: packed adapters in one run of device memory, where the scheduler puts them."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from mmap import mmap

import torch
from torch import Tensor

from gpu_worker.arrivals import Arrivals
from gpu_worker.device import zeros
from gpu_worker.kernels import Adapter, GroupWeights
from gpu_worker.kernels.segments import Segment
from gpu_worker.moves import move_down
from pipeline.adapter_layout import (
    GROUPS,
    MODULES,
    AdapterLayout,
    ModuleShape,
    Placement,
    layout,
    unpack_ranks,
)
from pipeline.messages import AdapterCopy, PlaceAdapter

SCRATCH_BYTES = 1 << 20


class AdapterPool:
    """Owns the device's copies of adapters.

    The scheduler decides what lies where, and never names a slot whose bytes it has given away.
    """

    def __init__(
        self,
        *,
        nbytes: int,
        shapes: tuple[ModuleShape, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.nbytes = nbytes
        self._pool = zeros((nbytes,), dtype=torch.uint8, device=device)
        self.shapes = shapes
        self._dtype = dtype
        self._arena: Tensor | None = None
        self._adapters: dict[int, Adapter] = {}
        self._versions = 0
        self._ranks: dict[int, bytes] = {}  # by slot
        self._scratch = torch.empty((SCRATCH_BYTES,), dtype=torch.uint8, device=device)
        self._placed: deque[int] = deque()

    @property
    def adapters(self) -> Mapping[int, Adapter]:
        """The resident adapters by slot."""
        return self._adapters

    def attach_arena(self, arena: mmap) -> None:
        """Copy out of this from now on; it stays mapped as long as the pool holds it."""
        self._arena = torch.frombuffer(arena, dtype=torch.uint8)

    def place(self, message: PlaceAdapter) -> None:
        """Bring an adapter in, in place of what its slot held; it is there when this returns."""
        for move in message.moves:
            move_down(self._pool, move.from_offset, move.to_offset, move.nbytes, self._scratch)
            self._show(move.slot, move.to_offset)
        self._copy(message.copy)
        self._placed.append(message.copy.slot)

    def placed(self) -> list[int]:
        """Slots of the placements since the last call, in their order."""
        slots = list(self._placed)
        self._placed.clear()
        return slots

    @property
    def is_placing(self) -> bool:
        """Whether `placed` has more to say."""
        return bool(self._placed)

    def arrivals(self, segments: Iterable[Segment]) -> Arrivals | None:
        """What a step of these segments has to wait for: nothing, here."""
        return None

    def _copy(self, copy: AdapterCopy) -> None:
        if self._arena is None:
            raise ValueError("an adapter is to be copied before the arena is attached")
        target = self._pool[copy.pool_offset : copy.pool_offset + copy.nbytes]
        target.copy_(self._arena[copy.arena_offset : copy.arena_offset + copy.nbytes])
        self._ranks[copy.slot] = copy.ranks
        found = self._show(copy.slot, copy.pool_offset)
        if found.nbytes != copy.nbytes:
            raise ValueError(f"{copy.nbytes} bytes for an adapter of {found.nbytes}")

    def _show(self, slot: int, offset: int) -> Adapter:
        """The adapter of this slot lies there from now on."""
        self._versions += 1
        self._adapters[slot] = self._views(offset, unpack_ranks(self._ranks[slot]))
        return self._adapters[slot]

    def _views(self, offset: int, ranks: Sequence[int]) -> Adapter:
        places = layout(ranks, self.shapes, self._dtype.itemsize)
        packed = self._pool[offset : offset + places.nbytes]
        layers = len(ranks) // len(MODULES)
        groups = tuple(
            tuple(self._group(packed, places, layer, group) for group in GROUPS)
            for layer in range(layers)
        )
        return Adapter(version=self._versions, nbytes=places.nbytes, groups=groups)

    def _group(
        self, packed: Tensor, places: AdapterLayout, layer: int, group: tuple[int, ...]
    ) -> GroupWeights:
        of_modules = [(self.shapes[module], places.at(layer, module)) for module in group]
        return GroupWeights(
            lora_a=self._stacked_a(packed, of_modules),
            lora_b=tuple(
                self._matrix(packed, place.b_offset, place.rank, shape.out_features).T
                for shape, place in of_modules
            ),
        )

    def _stacked_a(self, packed: Tensor, of_modules: list[tuple[ModuleShape, Placement]]) -> Tensor:
        """A view, unless the As do not follow each other without a gap, as in odd small models."""
        in_features = of_modules[0][0].in_features
        ranks = [place.rank for _, place in of_modules]
        row_bytes = in_features * self._dtype.itemsize
        start = end = of_modules[0][1].a_offset
        for _, place in of_modules:
            if place.rank and place.a_offset != end:
                parts = [
                    self._matrix(packed, place.a_offset, place.rank, in_features)
                    for _, place in of_modules
                ]
                return torch.cat(parts)
            end += place.rank * row_bytes
        return self._matrix(packed, start, sum(ranks), in_features)

    def _matrix(self, packed: Tensor, offset: int, rows: int, columns: int) -> Tensor:
        nbytes = rows * columns * self._dtype.itemsize
        return packed[offset : offset + nbytes].view(self._dtype).view(rows, columns)
