"""The linear layers of decode steps on CUDA, with LoRA or without, for CUDA graphs.

Owns what the kernels need between the layers of a step, and chooses the sizes of their blocks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu_worker.kernels.adapter_tables import RECORD, AdapterTables
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.triton_columns import (
    ENTRY,
    PADDING,
    RANKS,
    TILE_ROWS,
    ColumnBuffers,
    Columns,
)
from gpu_worker.kernels.triton_decode_shrink import decode_shrink_kernel
from gpu_worker.kernels.triton_linear import linear_kernel
from gpu_worker.layers import GATE_UP, LayerOps
from gpu_worker.layers.linear import Linear, PlainLinear
from pipeline.adapter_layout import GROUPS, ModuleShape

ROW_COLUMNS = 64  # columns that a row may have on average
LEAST_COLUMNS = 2048
MOST_ROWS = 128  # of a block
LEAST_OUTPUTS, MOST_OUTPUTS = 16, 64  # of a block
STAGE_BYTES = 192 << 10  # of shared memory for the blocks on their way
LORA_STAGE_BYTES = 176 << 10  # so that programs of the shrink may run beside
GATED_STAGE_BYTES = 96 << 10  # so that two programs run beside each other


class LinearTuning(NamedTuple):
    """Sizes of blocks for one linear layer. Powers of two; splits as many as the grid can hold."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    stages: int
    rank_stages: int
    warps: int


class ShrinkTuning(NamedTuple):
    """Sizes of blocks and launches of the shrink.

    splits  the most parts into which the input features of an entry are cut
    """

    k_block: int = 256
    splits: int = 32
    programs: int = 132 * 4
    warps: int = 2
    stages: int = 2


class DecodeLinears:
    """The kernels for one model. Steps must follow each other on one stream.

    rows  the most of a step
    pdl   programmatic dependent launch: a kernel's start overlaps its predecessor's end
    changes  of LinearTuning, by group, to try them out
    """

    def __init__(
        self,
        *,
        tables: AdapterTables,
        shapes: Sequence[ModuleShape],
        layers: int,
        rows: int,
        pdl: bool,
        processors: int = 132,
        shrink: ShrinkTuning | None = None,
        changes: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        self.tables = tables
        self.pdl = pdl
        self._shapes = shapes
        self._processors = processors
        self._changes = changes or {}
        self.shrink_tuning = shrink or ShrinkTuning()
        device = tables.table.device
        self.most_rows = rows
        self.most_columns = max(ROW_COLUMNS * rows, LEAST_COLUMNS)
        self._zeros = torch.zeros(
            max(shape.out_features for shape in shapes), dtype=tables.dtype
        ).to(device)
        self._buffers = ColumnBuffers(
            tables=tables,
            layers=layers,
            rows=rows,
            columns=self.most_columns,
            zeros=self._zeros.data_ptr(),
        )
        programs = self.shrink_tuning.programs
        self.parts = torch.zeros((programs, TILE_ROWS, RANKS), device=device)
        self.arrivals = torch.zeros(programs, dtype=torch.int32, device=device)

    @staticmethod
    def can_run(shapes: Sequence[ModuleShape], dtype: torch.dtype) -> bool:
        """Whether there are kernels for these layers: blocks must divide the outputs, and the bulk
        copy engine wants rows of a multiple of 16 bytes."""
        return dtype in (torch.bfloat16, torch.float16) and all(
            shape.out_features % LEAST_OUTPUTS == 0 and shape.in_features % 8 == 0
            for shape in shapes
        )

    def base(self) -> "DecodePlan":
        """For steps without adapters."""
        return DecodePlan(self, None)

    def plan(self, tiles: Tensor, tile_count: Tensor) -> "DecodePlan":
        """For a step with adapters; to be called before its first layer.

        tiles       int32[n, 3], of make_tiles with TILE_ROWS, none of the base model
        tile_count  int32[1], how many of them there are
        """
        return DecodePlan(self, self._buffers.plan(tiles, tile_count))

    def holds(self, segments: Sequence[Segment]) -> bool:
        """Whether the ranks of a step's adapters fit."""
        slots = [segment.slot for segment in segments]
        ranks = self.tables.max_ranks[slots]
        ranks[:, list(GROUPS[GATE_UP])] = ranks[:, list(GROUPS[GATE_UP])].max(1, keepdims=True)
        blocks: NDArray[np.int64] = -(-ranks // RANKS)
        return bool(blocks.sum(axis=0).max(initial=0) * RANKS <= self.most_columns - PADDING)

    def tuning(self, rows: int, group: int, in_features: int, *, lora: bool) -> LinearTuning:
        """For a layer of this group; benchmarks/lora_kernels.py compares others."""
        outs = [self._shapes[module].out_features for module in GROUPS[group]]
        gated = group == GATE_UP
        block_m = min(max(triton.next_power_of_2(rows), 16), MOST_ROWS)
        block_n = min(MOST_OUTPUTS, *(out & -out for out in outs))
        tiles = (outs[0] if gated else sum(outs)) // block_n * -(-rows // block_m)
        block_k = 128 if len(outs) == 1 and not lora else 64
        splits = 1
        if len(outs) == 1:  # the norm that follows adds the splits up
            while splits < 8 and tiles * splits * 2 <= self._processors:
                splits *= 2
        budget = LORA_STAGE_BYTES if lora else STAGE_BYTES
        if gated:
            budget = GATED_STAGE_BYTES
        stage_bytes = (block_m + block_n * (2 if gated else 1)) * block_k * 2
        return LinearTuning(
            block_m=block_m,
            block_n=block_n,
            block_k=min(block_k, triton.next_power_of_2(in_features)),
            splits=splits,
            stages=max(2, min(8, budget // stage_bytes)),
            rank_stages=3 if gated else 7,
            warps=4,
        )._replace(**self._changes.get(group, {}))


class DecodePlan:
    """The linear layers of one step.

    `apply` gives [splits, tokens, out] in fp32 where a layer is cut into splits, whose sum is y.
    """

    def __init__(self, owner: DecodeLinears, columns: Columns | None) -> None:
        self._owner = owner
        self._columns = columns

    def apply(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        """See Linears."""
        return self._linear(linear, x, layer, group)

    def gated(self, linear: Linear, x: Tensor, layer: int, ops: LayerOps) -> Tensor:
        """See Linears."""
        return self._linear(linear, x, layer, GATE_UP)

    def _linear(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        assert isinstance(linear, PlainLinear)
        owner, columns = self._owner, self._columns
        weight, bias = linear.weight, linear.bias
        (rows, k), n = x.shape, weight.shape[0]
        tuning = owner.tuning(rows, group, k, lora=columns is not None)
        gated = group == GATE_UP
        outs = [self._owner._shapes[module].out_features for module in GROUPS[group]]
        width = n // 2 if gated else n
        if tuning.splits > 1:
            y = torch.empty((tuning.splits, rows, width), dtype=torch.float32, device=x.device)
        else:
            y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
        if columns is not None:
            self._shrink(x, layer, group, columns)
        blocks = -(-rows // tuning.block_m)
        linear_kernel[(blocks * (width // tuning.block_n) * tuning.splits,)](
            TensorDescriptor.from_tensor(x, [tuning.block_m, tuning.block_k]),
            TensorDescriptor.from_tensor(weight, [tuning.block_n, tuning.block_k]),
            bias,
            y,
            rows,
            None
            if columns is None
            else TensorDescriptor.from_tensor(
                columns.h.view(-1, owner.most_columns), [tuning.block_m, PADDING]
            ),
            None if columns is None else columns.addresses[layer],
            None if columns is None else columns.counts,
            GROUPS[group][0],
            owner.most_columns,
            owner.most_rows,
            x,
            N=n,
            K=k,
            OUT_0=outs[0],
            OUT_1=outs[1] if len(outs) > 1 else 0,
            BLOCK_M=tuning.block_m,
            BLOCK_N=tuning.block_n,
            BLOCK_K=tuning.block_k,
            SPLITS=tuning.splits,
            STAGES=tuning.stages,
            RANKS=PADDING,
            RANK_STAGES=tuning.rank_stages,
            MODULES=len(outs),
            GATED=gated,
            BIAS=bias is not None,
            LORA=columns is not None,
            PDL=owner.pdl,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **({"launch_pdl": True} if owner.pdl else {}),
        )
        return y

    def _shrink(self, x: Tensor, layer: int, group: int, columns: Columns) -> None:
        owner, tuning = self._owner, self._owner.shrink_tuning
        k_block = min(tuning.k_block, triton.next_power_of_2(x.shape[1]))
        table = owner.tables.table
        decode_shrink_kernel[(tuning.programs,)](
            x,
            table,
            table.stride(0),
            AdapterTables.record(layer, GROUPS[group][0]),
            GROUPS[group][0],
            columns.entries,
            columns.entry_counts,
            columns.h,
            owner.parts,
            owner.arrivals,
            columns.entries.shape[1],
            owner.most_columns,
            owner.most_rows,
            K=x.shape[1],
            MODULES=len(GROUPS[group]),
            BLOCK_M=TILE_ROWS,
            RANKS=RANKS,
            BLOCK_K=k_block,
            MOST_SPLITS=min(tuning.splits, triton.next_power_of_2(x.shape[1] // k_block)),
            PROGRAMS=tuning.programs,
            ENTRY_SIZE=ENTRY,
            RECORD=RECORD,
            PDL=owner.pdl,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **({"launch_pdl": True} if owner.pdl else {}),
        )
