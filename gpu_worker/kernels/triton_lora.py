"""LoRA on CUDA: owns what the kernels need between the layers of a step, and launches them.

Every launch has the same number of programs, whatever the step: how many tiles there are, and
whose, lies in device memory. So a CUDA graph with these launches is valid for any mix of adapters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gpu_worker.kernels.adapter_tables import RECORD, AdapterTables
from gpu_worker.kernels.tiles import most_tiles
from gpu_worker.kernels.triton_expand import SQUARED, expand_kernel
from gpu_worker.kernels.triton_expand_rotary import expand_rotary_kernel
from gpu_worker.kernels.triton_expand_silu import expand_silu_kernel
from gpu_worker.kernels.triton_shrink import shrink_kernel
from gpu_worker.kernels.triton_step import ENTRY, PlanBuffers, StepTables
from pipeline.adapter_layout import GROUPS, MAX_RANK, ModuleShape

WIDE_STAGES = 2  # of the loops over large ranks
QKV, OUT, GATE_UP, DOWN = range(len(GROUPS))


class Tuning(NamedTuple):
    """Sizes of blocks and launches. Programs should be what the device runs at once.

    tile_height  tokens of a tile: a power of two, at least 16
    rank_block   ranks of an entry: a power of two, at least 16
    out_block    outputs of a block: a power of two, at least 64
    splits       the most parts into which the input features of an entry are cut
    atomic       add the parts up by atomics, in an h of its own per layer, zeroed once per step
    pdl          programmatic dependent launch: a kernel's launch overlaps its predecessor's end
    """

    tile_height: int = 16
    rank_block: int = 16
    k_block: int = 256
    splits: int = 8
    shrink_programs: int = 132 * 6
    shrink_warps: int = 2
    shrink_stages: int = 3
    out_block: int = 128
    expand_programs: int = 132 * 12
    expand_warps: int = 4
    expand_stages: int = 2
    atomic: bool = False
    pdl: bool = False


DECODE = Tuning()
PREFILL = Tuning(
    tile_height=64,
    rank_block=64,
    k_block=64,
    splits=4,
    shrink_programs=132 * 4,
    shrink_warps=4,
    shrink_stages=4,
    expand_programs=132 * 4,
    expand_warps=4,
)


class TritonLora:
    """The kernels for one model and one kind of step. Steps must follow each other on one stream,
    but a shrink may run beside what stands before its expand.

    tokens     the most of a step
    sequences  the most of a step
    max_rank   of a module
    """

    def __init__(
        self,
        *,
        tables: AdapterTables,
        shapes: Sequence[ModuleShape],
        layers: int,
        tokens: int,
        sequences: int,
        tuning: Tuning = DECODE,
        max_rank: int = MAX_RANK,
    ) -> None:
        self.tuning = tuning
        self._table = tables.table
        self._in = [shapes[group[0]].in_features for group in GROUPS]
        self._outs = [[shapes[module].out_features for module in group] for group in GROUPS]
        blocks = -(-max(map(len, GROUPS)) * max_rank // tuning.rank_block)
        bound = most_tiles(tokens, tuning.tile_height, sequences)
        self._buffers = PlanBuffers(
            most_tiles=bound, most_entries=bound * blocks, device=self._table.device
        )
        device = self._table.device
        dtype = torch.float32 if tuning.atomic else tables.dtype
        buffers = layers * len(GROUPS) if tuning.atomic else 2
        self._h = torch.zeros(
            (buffers, tokens * blocks, tuning.rank_block), dtype=dtype, device=device
        )
        self._h_of: list[Tensor] = list(self._h)
        split = tuning.shrink_programs * tuning.tile_height
        self._parts = torch.empty((2, split, tuning.rank_block), device=device)
        self._arrivals = torch.zeros((2, tuning.shrink_programs), dtype=torch.int32, device=device)

    def prepare(self, tiles: Tensor, tile_count: Tensor) -> StepTables:
        """Work out the tables of a step, before its first layer.

        tiles       int32[at most the bound, 3], of make_tiles with tuning.tile_height; to be kept
                    until the step is over
        tile_count  int32[1], how many of them there are
        """
        if self.tuning.atomic:
            self._h.zero_()
        return self._buffers.plan(tiles, tile_count, self._table, self.tuning.rank_block)

    def shrink(self, x: Tensor, step: StepTables, layer: int, group: int) -> None:
        """h = A x. x is [tokens, in]; its rows may be apart."""
        self._shrink(x, step, layer, group, x, x, x, 0.0, norm=False)

    def norm_shrink(
        self,
        residual: Tensor,
        normed: Tensor,
        weight: Tensor,
        squares: Tensor,
        eps: float,
        step: StepTables,
        layer: int,
        group: int,
    ) -> None:
        """normed = rms_norm(residual) * weight, and h = A normed. All tokens must have tiles.

        residual, normed  [tokens, in], normed contiguous
        squares           fp32[tokens, parts]: sums of squares of parts of each row of residual
        """
        self._shrink(residual, step, layer, group, normed, weight, squares, eps, norm=True)

    def expand(self, y: Tensor, step: StepTables, layer: int, group: int) -> None:
        """y += B h. y is [tokens, sum of the modules' out]; its rows may be apart."""
        self._expand(y, y, y, step, layer, group, residual_added=False)

    def expand_residual(
        self,
        y: Tensor,
        residual: Tensor,
        squares: Tensor,
        step: StepTables,
        layer: int,
        group: int,
    ) -> None:
        """residual += y + B h, for a group of one module. All tokens must have tiles.

        y         [tokens, out]
        residual  [tokens, out], contiguous
        squares   fp32[tokens, square_parts(group)], for norm_shrink
        """
        self._expand(y, residual, squares, step, layer, group, residual_added=True)

    def square_parts(self, group: int) -> int:
        """Parts into which expand_residual cuts a row of the residual."""
        return -(-self._outs[group][0] // SQUARED)

    def expand_silu(self, gate_up: Tensor, act: Tensor, step: StepTables, layer: int) -> None:
        """act = silu(gate + its B h) * (up + its B h). All tokens must have tiles.

        gate_up  [tokens, 2 * intermediate]; its rows may be apart
        act      [tokens, intermediate], contiguous
        """
        tuning = self.tuning
        expand_silu_kernel[(tuning.expand_programs,)](
            gate_up,
            gate_up.stride(0),
            act,
            *self._step(step, layer, GATE_UP),
            OUT=self._outs[GATE_UP][0],
            BLOCK_N=tuning.out_block,
            **self._expand_constants(),
        )

    def expand_rotary(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        kv_cache: Tensor,
        step: StepTables,
        layer: int,
    ) -> None:
        """Add B h to q, k and v, rotate q in place, and put k, rotated, and v into the cache.

        All tokens must have tiles.

        qkv        [tokens, (heads + 2 * kv_heads) * head_dim]; its rows may be apart
        cos, sin   fp32[positions, head_dim / 2]
        positions  integers [tokens]
        kv_slots   integers [tokens]: block * block_tokens + place in the block; negative: nowhere
        kv_cache   [blocks, 2, kv_heads, block_tokens, head_dim] of this layer
        """
        tuning = self.tuning
        _, _, kv_heads, block_tokens, head_dim = kv_cache.shape
        expand_rotary_kernel[(tuning.expand_programs,)](
            qkv,
            qkv.stride(0),
            cos,
            sin,
            positions,
            kv_slots,
            kv_cache,
            *self._step(step, layer, QKV),
            HEADS=self._outs[QKV][0] // head_dim,
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            HALF_P2=triton.next_power_of_2(head_dim // 2),
            BLOCK_TOKENS=block_tokens,
            **self._expand_constants(),
        )

    def _shrink(
        self,
        x: Tensor,
        step: StepTables,
        layer: int,
        group: int,
        normed: Tensor,
        weight: Tensor,
        squares: Tensor,
        eps: float,
        *,
        norm: bool,
    ) -> None:
        tuning = self.tuning
        parts = squares.shape[1] if norm else 1
        shrink_kernel[(tuning.shrink_programs,)](
            x,
            x.stride(0),
            self._table,
            self._table.stride(0),
            AdapterTables.record(layer, GROUPS[group][0]),
            step.groups[group].entries,
            step.groups[group].entry_count,
            self._h_at(layer, group),
            self._parts[group % 2],
            self._arrivals[group % 2],
            normed,
            weight,
            squares,
            eps,
            K=self._in[group],
            MODULES=len(GROUPS[group]),
            NORM=norm,
            SQUARES=parts,
            SQUARES_P2=triton.next_power_of_2(parts),
            BLOCK_M=tuning.tile_height,
            BLOCK_R=tuning.rank_block,
            BLOCK_K=tuning.k_block // 2 if norm else tuning.k_block,  # normed in registers
            MOST_SPLITS=tuning.splits,
            PROGRAMS=tuning.shrink_programs,
            ATOMIC=tuning.atomic,
            ENTRY_SIZE=ENTRY,
            RECORD=RECORD,
            PDL=tuning.pdl,
            num_warps=tuning.shrink_warps,
            num_stages=tuning.shrink_stages,
            **self._launch(),
        )

    def _expand(
        self,
        y: Tensor,
        residual: Tensor,
        squares: Tensor,
        step: StepTables,
        layer: int,
        group: int,
        *,
        residual_added: bool,
    ) -> None:
        tuning = self.tuning
        outs = [*self._outs[group], 0, 0]
        expand_kernel[(tuning.expand_programs,)](
            y,
            y.stride(0),
            *self._step(step, layer, group),
            residual,
            squares,
            OUT_0=outs[0],
            OUT_1=outs[1],
            OUT_2=outs[2],
            MODULES=len(self._outs[group]),
            RESIDUAL=residual_added,
            SQUARED_N=SQUARED,
            BLOCK_N=tuning.out_block,
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
            self._h_at(layer, group),
        )

    def _expand_constants(self) -> dict[str, int | bool]:
        tuning = self.tuning
        return {
            "BLOCK_M": tuning.tile_height,
            "BLOCK_R": tuning.rank_block,
            "PROGRAMS": tuning.expand_programs,
            "STAGES": tuning.expand_stages,
            "RECORD": RECORD,
            "PDL": tuning.pdl,
            "num_warps": tuning.expand_warps,
            "num_stages": WIDE_STAGES,
            **self._launch(),
        }

    def _launch(self) -> dict[str, bool]:
        return {"launch_pdl": True} if self.tuning.pdl else {}

    def _h_at(self, layer: int, group: int) -> Tensor:
        """Groups take turns, so that a shrink may be written while the last h is still read."""
        return self._h_of[layer * len(GROUPS) + group if self.tuning.atomic else group % 2]
