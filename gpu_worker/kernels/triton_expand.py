"""Expand: y += B h for all modules of a group."""

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
def _strip_of_module(
    y_row, valid, h, h_row, count, start, rank, lora_b, out, column, block_start, block_end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    CLASS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The blocks of one module, for a class of ranks. y_row are pointers [BLOCK_M] to tokens."""
    parts: tl.constexpr = 1 if CLASS == 0 else 2  # of a block, so that B's has bounded size
    PART_N: tl.constexpr = BLOCK_N // parts
    x = whole_x(h, h_row, count, start, rank, lora_b, BLOCK_M, BLOCK_R, CLASS)
    cols = tl.arange(0, PART_N)
    for block in tl.range(block_start * parts, block_end * parts, num_stages=STAGES):
        outs = block * PART_N + cols
        mask = valid[:, None]
        if not EVEN:
            mask = mask & (outs < out)[None, :]
        y_block = y_row[:, None] + (column + outs)[None, :]
        total = tl.load(y_block, mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros((BLOCK_M, PART_N), tl.float32)
        total += expanded(
            acc, x, h, h_row, count, start, rank, lora_b, outs, out, BLOCK_M, BLOCK_R, CLASS, EVEN
        )
        tl.store(y_block, total, mask=mask)


@triton.jit(do_not_specialize=["record"])
def expand_kernel(
    y, y_stride, table, table_stride, record, tiles, tile_count, h_rows, h,
    OUT_0: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr, MODULES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    blocks_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    blocks_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    blocks_2: tl.constexpr = (OUT_2 + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = blocks_0 + blocks_1 + blocks_2
    even: tl.constexpr = (OUT_0 % BLOCK_N == 0) & (OUT_1 % BLOCK_N == 0) & (OUT_2 % BLOCK_N == 0)
    n = tl.load(tile_count)
    strips = share(n, PROGRAMS, blocks)
    of_strip = tl.cdiv(blocks, strips)
    rows = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), n * strips, tl.num_programs(0)):
        strip, first, count, slot, h_row, place = strip_of(
            item, tiles, h_rows, table, table_stride, record, strips, of_strip
        )
        token = first + rows
        valid = rows < count
        y_row = y + token * y_stride
        for module in range(MODULES):
            in_1 = tl.minimum(module, 1)
            in_2 = tl.maximum(module - 1, 0)
            out = OUT_0 + in_1 * (OUT_1 - OUT_0) + in_2 * (OUT_2 - OUT_1)
            column = in_1 * OUT_0 + in_2 * OUT_1
            before_module = in_1 * blocks_0 + in_2 * blocks_1
            of_module = blocks_0 + in_1 * (blocks_1 - blocks_0) + in_2 * (blocks_2 - blocks_1)
            start = tl.maximum(strip - before_module, 0)
            end = tl.minimum(strip + of_strip - before_module, of_module)
            if start < end:
                lora_b, rank, rank_start = module_of(place + module * RECORD, slot, y)
                end = tl.where(rank == 0, start, end)
                which = class_of(rank)
                if which == 0:
                    _strip_of_module(
                        y_row, valid, h, h_row, count, rank_start, rank, lora_b, out, column,
                        start, end, BLOCK_M, BLOCK_N, BLOCK_R, 0, even, STAGES,
                    )  # fmt: skip
                elif which == 1:
                    _strip_of_module(
                        y_row, valid, h, h_row, count, rank_start, rank, lora_b, out, column,
                        start, end, BLOCK_M, BLOCK_N, BLOCK_R, 1, even, STAGES,
                    )  # fmt: skip
                else:
                    _strip_of_module(
                        y_row, valid, h, h_row, count, rank_start, rank, lora_b, out, column,
                        start, end, BLOCK_M, BLOCK_N, BLOCK_R, 2, even, 1,
                    )  # fmt: skip
