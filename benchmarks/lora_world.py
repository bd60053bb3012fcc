"""Adapters with random weights in device memory, and steps of them, for the benchmarks of LoRA."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from gpu_worker.kernels.adapter_tables import AdapterTables
from gpu_worker.kernels.segments import Segment, make_segments
from gpu_worker.kernels.triton_lora import TritonLora
from pipeline.adapter_layout import MODULES, ModuleShape, layout


class Sizes(NamedTuple):
    """Of a model like Llama; the defaults are those of Llama-3.1-8B."""

    hidden: int = 4096
    kv: int = 1024
    intermediate: int = 14336
    head_dim: int = 128
    layers: int = 32

    def shapes(self) -> tuple[ModuleShape, ...]:
        hidden, kv, wide = self.hidden, self.kv, self.intermediate
        sizes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        sizes += [(wide, hidden), (wide, hidden), (hidden, wide)]
        return tuple(ModuleShape(*size) for size in sizes)


class World:
    """Owns a pool of adapters: in slot i one of rank slot_ranks[i] on all modules."""

    def __init__(
        self, sizes: Sizes, slot_ranks: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sizes, self.shapes = sizes, sizes.shapes()
        self.slot_ranks, self.dtype, self.device = slot_ranks, dtype, device
        self.tables = AdapterTables(
            shapes=self.shapes,
            layers=sizes.layers,
            slots=len(slot_ranks),
            dtype=dtype,
            device=device,
        )
        of_rank = {
            rank: layout([rank] * len(MODULES) * sizes.layers, self.shapes, dtype.itemsize)
            for rank in set(slot_ranks)
        }
        offsets = np.cumsum([0, *(of_rank[rank].nbytes for rank in slot_ranks)]).tolist()
        self._pool = torch.empty(offsets[-1] // dtype.itemsize, dtype=dtype, device=device)
        self._pool.normal_(std=0.02)
        for slot, rank in enumerate(slot_ranks):
            address = self._pool.data_ptr() + offsets[slot]
            self.tables.fill(slot, address, [rank] * len(MODULES) * sizes.layers)

    def lora(self, *, tokens: int, sequences: int) -> TritonLora:
        return TritonLora(
            tables=self.tables,
            shapes=self.shapes,
            tokens=tokens,
            sequences=sequences,
            max_rank=max(self.slot_ranks),
        )


class Tokens(NamedTuple):
    """Whose the tokens of a step are."""

    name: str
    segments: list[Segment]
    tokens: int

    @property
    def slots(self) -> list[int]:
        return sorted({segment.slot for segment in self.segments})


def tokens_of(name: str, slots: Sequence[int], tokens: int) -> Tokens:
    """As many for each of these slots; without any, all are the base model's."""
    counts = np.full(len(slots), tokens // max(len(slots), 1), np.int64)
    return Tokens(name, make_segments(np.array(slots, np.int64), counts), tokens)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Timer:
    """Median times of CUDA graphs, each replay with a cold L2 cache."""

    def __init__(self, device: torch.device, *, rounds: int = 12) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        self._rounds = rounds

    def graph(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    def seconds(self, graph: torch.cuda.CUDAGraph, *, cold: bool = True) -> float:
        graph.replay()
        times = []
        for _ in range(self._rounds):
            if cold:
                self._flush.zero_()
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        return sorted(times)[len(times) // 2]

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self._flush.device)
        target = torch.empty_like(source)

        target.copy_(source)
        start, end = _event(), _event()
        start.record()
        for _ in range(8):
            target.copy_(source)  # not in a graph, where copies go through the copy engine
        end.record()
        end.synchronize()
        return 16 * source.nbytes / float(start.elapsed_time(end)) * 1e3
