"""The adapter pool: packed adapters in one run of device memory, where the scheduler puts them.

This is that of a CPU, where one thread both copies and steps. So a copy goes piece by piece,
between the steps of others; a step that uses the adapter makes it whole first.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from mmap import mmap
from typing import NamedTuple

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
PIECE_BYTES = 1 << 20  # about 0.3 ms


class _Copy(NamedTuple):
    """Bytes on their way into a slot."""

    slot: int
    offset: int  # in the pool
    target: Tensor
    source: Tensor


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
        self._copies: deque[_Copy] = deque()  # to be made, in order
        self._copied = 0  # bytes of the first
        self._placed: deque[int] = deque()

    @property
    def adapters(self) -> Mapping[int, Adapter]:
        """The resident adapters by slot."""
        return self._adapters

    def attach_arena(self, arena: mmap) -> None:
        """Copy out of this from now on; it stays mapped as long as the pool holds it."""
        self._arena = torch.frombuffer(arena, dtype=torch.uint8)

    def start_over(self) -> None:
        """No slot holds anything, and nothing is on its way."""
        self._copies.clear()
        self._copied = 0
        self._placed.clear()
        self._adapters.clear()
        self._ranks.clear()

    def place(self, message: PlaceAdapter) -> None:
        """Start to bring an adapter in, in place of what its slot held."""
        while message.moves and self._copies:  # moves may be of what is on its way
            self._copy_piece()
        for move in message.moves:
            move_down(self._pool, move.from_offset, move.to_offset, move.nbytes, self._scratch)
            self._show(move.slot, move.to_offset)
        self._begin(message.copy)

    def advance(self, seconds: float) -> bool:
        """Go on with what is on its way for so long, or for one piece if that takes longer.

        Returns False when there is nothing to be done.
        """
        if not self._copies:
            return False
        until = time.perf_counter() + seconds
        self._copy_piece()
        while self._copies and time.perf_counter() < until:
            self._copy_piece()
        return True

    def placed(self) -> list[int]:
        """Slots of the placements that have ended since the last call, in their order."""
        slots = list(self._placed)
        self._placed.clear()
        return slots

    @property
    def is_placing(self) -> bool:
        """Whether `placed` has more to say, now or later."""
        return bool(self._copies or self._placed)

    def arrivals(self, segments: Iterable[Segment]) -> Arrivals | None:
        """What a step of these segments has to wait for: nothing, once this returns."""
        slots = {segment.slot for segment in segments}
        while any(copy.slot in slots for copy in self._copies):
            self._copy_piece()
        return None

    def _begin(self, copy: AdapterCopy) -> None:
        if self._arena is None:
            raise ValueError("an adapter is to be copied before the arena is attached")
        nbytes = layout(unpack_ranks(copy.ranks), self.shapes, self._dtype.itemsize).nbytes
        if nbytes != copy.nbytes:
            raise ValueError(f"{copy.nbytes} bytes for an adapter of {nbytes}")
        self._ranks[copy.slot] = copy.ranks
        target = self._pool[copy.pool_offset : copy.pool_offset + copy.nbytes]
        source = self._arena[copy.arena_offset : copy.arena_offset + copy.nbytes]
        self._copies.append(_Copy(copy.slot, copy.pool_offset, target, source))

    def _copy_piece(self) -> None:
        """Of the oldest copy. Its slot shows it once it is whole."""
        slot, offset, target, source = self._copies[0]
        piece = slice(self._copied, self._copied + PIECE_BYTES)
        target[piece].copy_(source[piece])
        self._copied += PIECE_BYTES
        if self._copied >= len(target):
            self._copies.popleft()
            self._copied = 0
            self._show(slot, offset)
            self._placed.append(slot)

    def _show(self, slot: int, offset: int) -> None:
        """The adapter of this slot lies there from now on."""
        self._versions += 1
        self._adapters[slot] = self._views(offset, unpack_ranks(self._ranks[slot]))

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
