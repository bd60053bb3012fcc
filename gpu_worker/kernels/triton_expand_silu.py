"""Expand of gate and up with what follows it: act = silu(gate) * up."""

import triton
import triton.language as tl

from gpu_worker.kernels.triton_expand_parts import (
    class_of,
    expanded,
    module_of,
    strip_of,
    whole_x,
)
from gpu_worker.kernels.triton_step import share


@triton.jit
def _strip(
    gate_row, act_row, valid, h, h_row, count, gate_b, gate_rank, gate_start, up_b, up_rank,
    up_start, block_start, block_end,
    OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    CLASS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 1 if CLASS == 0 else 2
    PART_N: tl.constexpr = BLOCK_N // parts
    gate_x = whole_x(h, h_row, count, gate_start, gate_rank, gate_b, BLOCK_M, BLOCK_R, CLASS)
    up_x = whole_x(h, h_row, count, up_start, up_rank, up_b, BLOCK_M, BLOCK_R, CLASS)
    cols = tl.arange(0, PART_N)
    for block in tl.range(block_start * parts, block_end * parts, num_stages=STAGES):
        outs = block * PART_N + cols
        mask = valid[:, None]
        if not EVEN:
            mask = mask & (outs < OUT)[None, :]
        gate_block = gate_row[:, None] + outs[None, :]
        gate = tl.load(gate_block, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_block + OUT, mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros((BLOCK_M, PART_N), tl.float32)
        gate += expanded(
            acc, gate_x, h, h_row, count, gate_start, gate_rank, gate_b, outs, OUT,
            BLOCK_M, BLOCK_R, CLASS, EVEN,
        )  # fmt: skip
        up += expanded(
            acc, up_x, h, h_row, count, up_start, up_rank, up_b, outs, OUT,
            BLOCK_M, BLOCK_R, CLASS, EVEN,
        )  # fmt: skip
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(act_row[:, None] + outs[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["record"])
def expand_silu_kernel(
    gate_up, gate_up_stride, act, table, table_stride, record, tiles, tile_count, h_rows, h,
    OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PROGRAMS: tl.constexpr, STAGES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """gate_up [tokens, 2 * OUT], act [tokens, OUT]; a block is the same outputs of both."""
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    even: tl.constexpr = OUT % BLOCK_N == 0
    n = tl.load(tile_count)
    strips = share(n, PROGRAMS, blocks)
    of_strip = tl.cdiv(blocks, strips)
    rows = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), n * strips, tl.num_programs(0)):
        start, first, count, slot, h_row, place = strip_of(
            item, tiles, h_rows, table, table_stride, record, strips, of_strip
        )
        token = first + rows
        valid = rows < count
        gate_row = gate_up + token * gate_up_stride
        act_row = act + token * OUT
        end = tl.minimum(start + of_strip, blocks)
        gate_b, gate_rank, gate_start = module_of(place, slot, act)
        up_b, up_rank, up_start = module_of(place + RECORD, slot, act)
        which = tl.maximum(class_of(gate_rank), class_of(up_rank))  # each does for those below
        if which == 0:
            _strip(
                gate_row, act_row, valid, h, h_row, count, gate_b, gate_rank, gate_start,
                up_b, up_rank, up_start, start, end, OUT, BLOCK_M, BLOCK_N, BLOCK_R, 0, even,
                STAGES,
            )  # fmt: skip
        elif which == 1:
            _strip(
                gate_row, act_row, valid, h, h_row, count, gate_b, gate_rank, gate_start,
                up_b, up_rank, up_start, start, end, OUT, BLOCK_M, BLOCK_N, BLOCK_R, 1, even,
                STAGES,
            )  # fmt: skip
        else:
            _strip(
                gate_row, act_row, valid, h, h_row, count, gate_b, gate_rank, gate_start,
                up_b, up_rank, up_start, start, end, OUT, BLOCK_M, BLOCK_N, BLOCK_R, 2, even, 1,
            )  # fmt: skip
