"""The Triton LoRA kernels as the worker uses them: one plan per step, for all its layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gpu_worker.device import to_device
from gpu_worker.kernels import Adapter, AddingPlan
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.tiles import make_tiles
from gpu_worker.kernels.triton_lora import TritonLora
from gpu_worker.kernels.triton_step import StepTables
from gpu_worker.layers.linear import Linear


class TritonKernels:
    """For steps that run eagerly."""

    def __init__(self, lora: TritonLora, device: torch.device) -> None:
        self._lora = lora
        self._device = device

    def plan(self, segments: list[Segment], adapters: Mapping[int, Adapter]) -> AddingPlan:
        tiles = make_tiles(segments, self._lora.tuning.tile_height)
        count = torch.tensor([len(tiles)], dtype=torch.int32)
        tables = self._lora.prepare(
            to_device(tiles, self._device), count.to(self._device, non_blocking=True)
        )
        return TritonPlan(self._lora, tables)


class TritonPlan(AddingPlan):
    """One after the other, on one stream."""

    def __init__(self, lora: TritonLora, tables: StepTables) -> None:
        self._lora = lora
        self._tables = tables

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        self._lora.shrink(x, self._tables, layer, group)
        self._lora.expand(y, self._tables, layer, group)


class OverlappedPlan(TritonPlan):
    """The shrink runs beside the base model's product, on a stream of its own."""

    def __init__(self, lora: TritonLora, tables: StepTables, stream: torch.cuda.Stream) -> None:
        super().__init__(lora, tables)
        self._stream = stream

    def apply(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._lora.shrink(x, self._tables, layer, group)
        y = linear(x)
        here.wait_stream(self._stream)
        self._lora.expand(y, self._tables, layer, group)
        return y
