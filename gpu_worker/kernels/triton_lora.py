"""LoRA on CUDA for steps with a prefill: owns what the kernels need between the layers of a step.

Every launch has the same number of programs, whatever the step: how many tiles there are, and
whose, lies in device memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_worker.kernels.adapter_tables import RECORD, AdapterTables
from gpu_worker.kernels.tiles import most_tiles
from gpu_worker.kernels.triton_expand import expand_kernel
from gpu_worker.kernels.triton_expand_silu import expand_silu_kernel
from gpu_worker.kernels.triton_shrink import shrink_kernel
from gpu_worker.kernels.triton_step import ENTRY, PlanBuffers, StepTables
from gpu_worker.layers import GATE_UP
from pipeline.adapter_layout import GROUPS, MAX_RANK, ModuleShape

WIDE_STAGES = 2  # of the loops over large ranks


class Tuning(NamedTuple):
    """Sizes of blocks and launches. Programs should be what the device runs at once.

    tile_height  tokens of a tile: a power of two, at least 16
    rank_block   ranks of an entry: a power of two, at least 16
    out_block    outputs of a block: a power of two, at least 64
    splits       the most parts into which the input features of an entry are cut
    """

    tile_height: int = 64
    rank_block: int = 64
    k_block: int = 128
    splits: int = 2
    shrink_programs: int = 132 * 2
    shrink_warps: int = 8
    shrink_stages: int = 4
    out_block: int = 64
    expand_programs: int = 132 * 2
    expand_warps: int = 8
    expand_stages: int = 3


class TritonLora:
    """The kernels for one model. Steps must follow each other on one stream.

    tokens     the most of a step
    sequences  the most of a step
    max_rank   of a module
    """

    def __init__(
        self,
        *,
        tables: AdapterTables,
        shapes: Sequence[ModuleShape],
        tokens: int,
        sequences: int,
        tuning: Tuning | None = None,
        max_rank: int = MAX_RANK,
    ) -> None:
        self.tuning = tuning = tuning or Tuning()
        self._table = tables.table
        self._in = [shapes[group[0]].in_features for group in GROUPS]
        self._outs = [[shapes[module].out_features for module in group] for group in GROUPS]
        blocks = -(-max(map(len, GROUPS)) * max_rank // tuning.rank_block)
        bound = most_tiles(tokens, tuning.tile_height, sequences)
        device = self._table.device
        self._buffers = PlanBuffers(most_tiles=bound, most_entries=bound * blocks, device=device)
        self._h = torch.zeros((tokens * blocks, tuning.rank_block), dtype=tables.dtype).to(device)
        split = tuning.shrink_programs * tuning.tile_height
        self._parts = torch.empty((split, tuning.rank_block), device=device)
        self._arrivals = torch.zeros(tuning.shrink_programs, dtype=torch.int32).to(device)

    def prepare(self, tiles: Tensor, tile_count: Tensor) -> StepTables:
        """Work out the tables of a step, before its first layer.

        tiles       int32[at most the bound, 3], of make_tiles with tuning.tile_height; to be kept
                    until the step is over
        tile_count  int32[1], how many of them there are
        """
        return self._buffers.plan(tiles, tile_count, self._table, self.tuning.rank_block)

    def shrink(self, x: Tensor, step: StepTables, layer: int, group: int) -> None:
        """h = A x. x is [tokens, in]; its rows may be apart."""
        tuning = self.tuning
        shrink_kernel[(tuning.shrink_programs,)](
            x,
            x.stride(0),
            self._table,
            self._table.stride(0),
            AdapterTables.record(layer, GROUPS[group][0]),
            step.groups[group].entries,
            step.groups[group].entry_count,
            self._h,
            self._parts,
            self._arrivals,
            K=self._in[group],
            MODULES=len(GROUPS[group]),
            BLOCK_M=tuning.tile_height,
            BLOCK_R=tuning.rank_block,
            BLOCK_K=tuning.k_block,
            MOST_SPLITS=tuning.splits,
            PROGRAMS=tuning.shrink_programs,
            ENTRY_SIZE=ENTRY,
            RECORD=RECORD,
            num_warps=tuning.shrink_warps,
            num_stages=tuning.shrink_stages,
        )

    def expand(self, y: Tensor, step: StepTables, layer: int, group: int) -> None:
        """y += B h. y is [tokens, sum of the modules' out]; its rows may be apart."""
        outs = [*self._outs[group], 0, 0]
        expand_kernel[(self.tuning.expand_programs,)](
            y,
            y.stride(0),
            *self._step(step, layer, group),
            OUT_0=outs[0],
            OUT_1=outs[1],
            OUT_2=outs[2],
            MODULES=len(self._outs[group]),
            **self._expand_constants(),
        )

    def expand_silu(self, gate_up: Tensor, act: Tensor, step: StepTables, layer: int) -> None:
        """act = silu(gate + its B h) * (up + its B h). All tokens must have tiles.

        gate_up  [tokens, 2 * intermediate]; its rows may be apart
        act      [tokens, intermediate], contiguous
        """
        expand_silu_kernel[(self.tuning.expand_programs,)](
            gate_up,
            gate_up.stride(0),
            act,
            *self._step(step, layer, GATE_UP),
            OUT=self._outs[GATE_UP][0],
            **self._expand_constants(),
        )

    def _step(self, step: StepTables, layer: int, group: int) -> tuple[Tensor | int, ...]:
        """The arguments that all kernels that expand have in common."""
        return (
            self._table,
            self._table.stride(0),
            AdapterTables.record(layer, GROUPS[group][0]),
            step.tiles,
            step.tile_count,
            step.groups[group].h_rows,
            self._h,
        )

    def _expand_constants(self) -> dict[str, int]:
        tuning = self.tuning
        return {
            "BLOCK_M": tuning.tile_height,
            "BLOCK_N": tuning.out_block,
            "BLOCK_R": tuning.rank_block,
            "PROGRAMS": tuning.expand_programs,
            "STAGES": tuning.expand_stages,
            "RECORD": RECORD,
            "num_warps": tuning.expand_warps,
            "num_stages": WIDE_STAGES,
        }
