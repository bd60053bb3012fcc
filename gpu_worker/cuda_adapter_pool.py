"""The adapter pool on a GPU: adapters come out of pinned memory on a stream of their own."""

from collections.abc import Iterable, Mapping
from mmap import mmap

import torch
from torch import Tensor

from gpu_worker.device import zeros
from gpu_worker.kernels import Adapter
from gpu_worker.kernels.adapter_tables import AdapterTables
from pipeline.adapter_layout import unpack_ranks
from pipeline.messages import AdapterCopy


class CudaAdapterPool:
    """Owns the device's copies of adapters, and the tables that say to kernels where they lie.

    The scheduler decides what lies where, and never names a slot whose bytes a step in flight
    still reads.
    """

    adapters: Mapping[int, Adapter] = {}  # kernels read the tables

    def __init__(self, *, nbytes: int, tables: AdapterTables, device: torch.device) -> None:
        self.nbytes = nbytes
        self.tables = tables
        self._pool = zeros((nbytes,), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arena: Tensor | None = None

    def attach_arena(self, arena: mmap) -> None:
        """Copy out of this from now on; it is pinned, and stays mapped as long as the pool holds
        it."""
        self._arena = torch.frombuffer(arena, dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(
            runtime.cudaHostRegister(self._arena.data_ptr(), self._arena.nbytes, 0)
        )

    def copy(self, copies: Iterable[AdapterCopy]) -> int:
        """Bring adapters in, each in place of what its slot held. Returns the bytes that are on
        their way: what is launched from now on finds them there."""
        copied = 0
        for copy in copies:
            if self._arena is None:
                raise ValueError("an adapter is to be copied before the arena is attached")
            target = self._pool[copy.pool_offset : copy.pool_offset + copy.nbytes]
            source = self._arena[copy.arena_offset : copy.arena_offset + copy.nbytes]
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
            self.tables.fill(copy.slot, target.data_ptr(), unpack_ranks(copy.ranks))
            copied += copy.nbytes
        torch.cuda.current_stream().wait_stream(self._stream)
        return copied
