"""The adapter pool on a GPU: adapters come out of pinned memory on a stream of their own.

A step waits for the adapters that it uses, and for no others: each has its own events. The stream
of the copies waits for no step, since the scheduler names no slot and no bytes that a step which
is not done still reads; all but moves of adapters in use, which take their turn among the steps.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from mmap import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_worker.arrivals import Arrival, Arrivals, make_chunks
from gpu_worker.device import zeros
from gpu_worker.kernels import Adapter
from gpu_worker.kernels.adapter_tables import AdapterTables
from gpu_worker.kernels.segments import Segment
from gpu_worker.moves import move_down
from pipeline.adapter_layout import unpack_ranks
from pipeline.messages import AdapterCopy, AdapterMove, PlaceAdapter

SCRATCH_BYTES = 16 << 20


class _Placing(NamedTuple):
    """A placement on its way."""

    slot: int  # of the copy
    arrivals: dict[int, Arrival]  # by slot, of the copy and what is moved

    @property
    def copied(self) -> Arrival:
        return self.arrivals[self.slot]


class CudaAdapterPool:
    """Owns the device's copies of adapters, and the tables that say to kernels where they lie."""

    adapters: Mapping[int, Adapter] = {}  # kernels read the tables

    def __init__(self, *, nbytes: int, tables: AdapterTables, device: torch.device) -> None:
        self.nbytes = nbytes
        self.tables = tables
        self._pool = zeros((nbytes,), dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._scratch = zeros((SCRATCH_BYTES,), dtype=torch.uint8, device=device)
        self._arena: Tensor | None = None
        self._arriving: dict[int, Arrival] = {}  # by slot
        self._placing: deque[_Placing] = deque()  # in order

    def attach_arena(self, arena: mmap) -> None:
        """Copy out of this from now on; it is pinned, and stays mapped as long as the pool holds
        it."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if self._arena is not None:
            self.stream.synchronize()
            torch.cuda.check_error(runtime.cudaHostUnregister(self._arena.data_ptr()))
        self._arena = torch.frombuffer(arena, dtype=torch.uint8)
        torch.cuda.check_error(
            runtime.cudaHostRegister(self._arena.data_ptr(), self._arena.nbytes, 0)
        )

    def start_over(self) -> None:
        """No slot holds anything. To be called when the device has nothing more to do."""
        self._arriving.clear()
        self._placing.clear()

    def place(self, message: PlaceAdapter) -> None:
        """Start to bring an adapter in, in place of what its slot held."""
        arrivals = self._move(message.moves)
        slot = message.copy.slot
        arrivals[slot] = self._copy(message.copy)
        self._arriving.update(arrivals)
        self._placing.append(_Placing(slot, arrivals))

    def advance(self, seconds: float) -> bool:
        """Nothing is to be done: the device copies by itself."""
        return False

    def placed(self) -> list[int]:
        """Slots of the placements that have ended since the last call, in their order: the arena
        is not read for them any more."""
        slots = []
        while self._placing and self._placing[0].copied.is_over:
            placing = self._placing.popleft()
            slots.append(placing.slot)
            for slot, arrival in placing.arrivals.items():
                if self._arriving.get(slot) is arrival:
                    del self._arriving[slot]
        return slots

    @property
    def is_placing(self) -> bool:
        """Whether `placed` has more to say, now or later."""
        return bool(self._placing)

    def arrivals(self, segments: Iterable[Segment]) -> Arrivals | None:
        """What a step of these segments has to wait for."""
        if not self._arriving:
            return None
        slots = {segment.slot for segment in segments} & self._arriving.keys()
        return Arrivals(self._arriving[slot] for slot in slots) if slots else None

    def _move(self, moves: Sequence[AdapterMove]) -> dict[int, Arrival]:
        """Beside the steps, or between those launched and those to come if one is in use."""
        if not moves:
            return {}
        stream = self.stream
        if any(move.in_use for move in moves):
            stream = torch.cuda.current_stream()
            stream.wait_stream(self.stream)
        with torch.cuda.stream(stream):
            for move in moves:
                move_down(self._pool, move.from_offset, move.to_offset, move.nbytes, self._scratch)
                self.tables.shift(move.slot, move.to_offset - move.from_offset)
        event = stream.record_event()
        self.stream.wait_event(event)
        return {move.slot: Arrival(((0, event),)) for move in moves}

    def _copy(self, copy: AdapterCopy) -> Arrival:
        if self._arena is None:
            raise ValueError("an adapter is to be copied before the arena is attached")
        target = self._pool[copy.pool_offset : copy.pool_offset + copy.nbytes]
        source = self._arena[copy.arena_offset : copy.arena_offset + copy.nbytes]
        ranks = unpack_ranks(copy.ranks)
        events = []
        with torch.cuda.stream(self.stream):
            self.tables.fill(copy.slot, target.data_ptr(), ranks)
            for chunk in make_chunks(self.tables.layer_bytes(ranks)):
                target[chunk.start : chunk.end].copy_(
                    source[chunk.start : chunk.end], non_blocking=True
                )
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                events.append((chunk.first_layer, event))
        return Arrival(tuple(events))
