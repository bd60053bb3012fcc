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
from gpu_worker.layers import GATE_UP, LayerOps
from gpu_worker.layers.linear import Linear


class TritonKernels:
    """For steps that run eagerly."""

    def __init__(self, lora: TritonLora, device: torch.device) -> None:
        self._lora = lora
        self._device = device

    def plan(self, segments: list[Segment], adapters: Mapping[int, Adapter]) -> "TritonPlan":
        tiles = make_tiles(segments, self._lora.tuning.tile_height)
        count = torch.tensor([len(tiles)], dtype=torch.int32)
        tables = self._lora.prepare(
            to_device(tiles, self._device), count.to(self._device, non_blocking=True)
        )
        return TritonPlan(self._lora, tables, int(tiles[:, 1].sum()))


class TritonPlan(AddingPlan):
    """covered  how many tokens have an adapter"""

    def __init__(self, lora: TritonLora, tables: StepTables, covered: int = -1) -> None:
        self._lora = lora
        self._tables = tables
        self._covered = covered

    def gated(self, linear: Linear, x: Tensor, layer: int, ops: LayerOps) -> Tensor:
        """See Linears."""
        if self._covered != len(x):
            return super().gated(linear, x, layer, ops)
        gate_up = linear(x)
        self._lora.shrink(x, self._tables, layer, GATE_UP)
        act = x.new_empty((len(x), gate_up.shape[1] // 2))
        self._lora.expand_silu(gate_up, act, self._tables, layer)
        return act

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        self._lora.shrink(x, self._tables, layer, group)
        self._lora.expand(y, self._tables, layer, group)
