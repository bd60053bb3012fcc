"""Expand: y += B h for all modules of a group, alone or with what follows it in the model.

Each tile is shared by as many programs as there are to spare, each with a strip of neighbouring
blocks of outputs. A block belongs to one module; it loops over the ranks of its adapter there.
"""

import triton
import triton.language as tl

from gpu_worker.kernels.triton_step import share

WIDE = 32  # ranks at once where there are more than 16


@triton.jit
def _shrunk(
    h, h_row, count, splits, rows, ranks, wanted, BLOCK_R: tl.constexpr, MOST_SPLITS: tl.constexpr
):
    """fp32[rows, ranks] of a tile whose h starts after h_row rows; `ranks` as they are stacked."""
    h += h_row * splits * BLOCK_R
    block_row = ranks // BLOCK_R * (count * splits)
    place = (block_row[None, :] + rows[:, None]) * BLOCK_R + (ranks % BLOCK_R)[None, :]
    mask = (rows < count)[:, None] & wanted[None, :]
    if MOST_SPLITS == 1:
        total = tl.load(h + place, mask=mask, other=0.0)
    else:
        split = tl.arange(0, MOST_SPLITS)
        place = place[None, :, :] + (split * count * BLOCK_R)[:, None, None]
        mask = mask[None, :, :] & (split < splits)[:, None, None]
        total = tl.sum(tl.load(h + place, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _add_ranks(
    acc,
    h,
    h_row,
    count,
    splits,
    rows,
    start,
    rank,
    r,
    lora_b,
    outs,
    in_module,
    BLOCK_R: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """acc [rows, outs] += B h for the ranks r of a module whose ranks start at `start`."""
    b = tl.load(
        lora_b + outs[:, None].to(tl.int64) * rank + r[None, :],
        mask=in_module[:, None] & (r < rank)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    shrunk = _shrunk(h, h_row, count, splits, rows, start + r, r < rank, BLOCK_R, MOST_SPLITS)
    return tl.dot(shrunk.to(b.dtype), tl.trans(b), acc, input_precision="ieee")


@triton.jit
def _expanded(
    h,
    h_row,
    count,
    splits,
    rows,
    record,
    slot,
    outs,
    in_module,
    like,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    WIDE_R: tl.constexpr,
):
    """fp32[BLOCK_M, BLOCK_N]: B h for outputs `outs` of the module with this record.

    A rank that is a multiple of 8 is written as (rank // 8) * 8, from which the compiler sees that
    whole vectors can be loaded.
    """
    address = tl.load(record + 1, eviction_policy="evict_last")
    rank = tl.load(record + 2, eviction_policy="evict_last").to(tl.int32)
    start = tl.load(record + 3, eviction_policy="evict_last").to(tl.int32)
    rank = tl.where(slot >= 0, rank, 0)
    lora_b = tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if rank > 0:
        eights = (rank // 8) * 8
        if eights != rank:
            for first in range(0, rank, 16):
                acc = _add_ranks(
                    acc, h, h_row, count, splits, rows, start, rank, first + tl.arange(0, 16),
                    lora_b, outs, in_module, BLOCK_R, MOST_SPLITS,
                )  # fmt: skip
        elif eights <= 16:
            acc = _add_ranks(
                acc, h, h_row, count, splits, rows, start, eights, tl.arange(0, 16),
                lora_b, outs, in_module, BLOCK_R, MOST_SPLITS,
            )  # fmt: skip
        else:
            for first in range(0, eights, WIDE_R):
                acc = _add_ranks(
                    acc, h, h_row, count, splits, rows, start, eights,
                    first + tl.arange(0, WIDE_R), lora_b, outs, in_module, BLOCK_R, MOST_SPLITS,
                )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["record"])
def expand_kernel(
    y,
    y_stride,
    table,
    table_stride,
    record,
    tiles,
    tile_count,
    h_rows,
    entry_count,
    h,
    residual,
    squares,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE_R: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    SHRINK_PROGRAMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += B h; or with RESIDUAL (and one module) residual += y + B h, and its squares.

    residual  [tokens, OUT_0], contiguous
    squares   fp32[tokens, blocks of outputs]: the sum of squares of each block of the new residual
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    blocks_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    blocks_2: tl.constexpr = (OUT_2 + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = blocks_0 + blocks_1 + blocks_2
    n = tl.load(tile_count)
    splits = share(tl.load(entry_count), SHRINK_PROGRAMS, MOST_SPLITS)
    strips = share(n, PROGRAMS, blocks)
    of_strip = tl.cdiv(blocks, strips)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    for item in range(tl.program_id(0), n * strips, tl.num_programs(0)):
        tile = item // strips
        strip = item % strips
        first = tl.load(tiles + tile * 3)
        count = tl.load(tiles + tile * 3 + 1)
        slot = tl.load(tiles + tile * 3 + 2)
        h_row = tl.load(h_rows + tile).to(tl.int64)
        place = table + tl.maximum(slot, 0).to(tl.int64) * table_stride + record
        token = (first + rows).to(tl.int64)
        start = strip * of_strip
        of_item = tl.minimum(of_strip, blocks - start)
        if not RESIDUAL:
            of_item = tl.where(slot < 0, 0, of_item)
        for index in range(of_item):
            block = start + index
            in_1 = (block >= blocks_0).to(tl.int32)
            in_2 = (block >= blocks_0 + blocks_1).to(tl.int32)
            module_block = block - in_1 * blocks_0 - in_2 * blocks_1
            out = OUT_0 + in_1 * (OUT_1 - OUT_0) + in_2 * (OUT_2 - OUT_1)
            outs = module_block * BLOCK_N + cols
            in_module = outs < out
            column = in_1 * OUT_0 + in_2 * OUT_1 + outs
            mask = (rows < count)[:, None] & in_module[None, :]
            y_block = y + token[:, None] * y_stride + column[None, :]
            before = tl.load(y_block, mask=mask, other=0.0)
            if RESIDUAL:
                residual_block = residual + token[:, None] * OUT_0 + column[None, :]
                added_to = tl.load(residual_block, mask=mask, other=0.0)
            added = _expanded(
                h, h_row, count, splits, rows, place + (in_1 + in_2) * RECORD, slot, outs,
                in_module, y, BLOCK_M, BLOCK_N, BLOCK_R, MOST_SPLITS, WIDE_R,
            )  # fmt: skip
            total = before.to(tl.float32) + added
            if RESIDUAL:
                total = (total + added_to.to(tl.float32)).to(y.dtype.element_ty)
                tl.store(residual_block, total, mask=mask)
                total = total.to(tl.float32)
                of_row = tl.sum(total * total, axis=1)
                tl.store(squares + token * blocks + block, of_row, mask=rows < count)
            else:
                tl.store(y_block, total, mask=mask)


@triton.jit(do_not_specialize=["record"])
def expand_silu_kernel(
    gate_up,
    gate_up_stride,
    act,
    table,
    table_stride,
    record,
    tiles,
    tile_count,
    h_rows,
    entry_count,
    h,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE_R: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    SHRINK_PROGRAMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    """act = silu(gate + B_gate h) * (up + B_up h); gate_up [tokens, 2 * OUT], act [tokens, OUT]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    n = tl.load(tile_count)
    splits = share(tl.load(entry_count), SHRINK_PROGRAMS, MOST_SPLITS)
    strips = share(n, PROGRAMS, blocks)
    of_strip = tl.cdiv(blocks, strips)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    for item in range(tl.program_id(0), n * strips, tl.num_programs(0)):
        tile = item // strips
        strip = item % strips
        first = tl.load(tiles + tile * 3)
        count = tl.load(tiles + tile * 3 + 1)
        slot = tl.load(tiles + tile * 3 + 2)
        h_row = tl.load(h_rows + tile).to(tl.int64)
        place = table + tl.maximum(slot, 0).to(tl.int64) * table_stride + record
        token = (first + rows).to(tl.int64)
        start = strip * of_strip
        of_item = tl.minimum(of_strip, blocks - start)
        for index in range(of_item):
            block = start + index
            outs = block * BLOCK_N + cols
            in_module = outs < OUT
            mask = (rows < count)[:, None] & in_module[None, :]
            gate_block = gate_up + token[:, None] * gate_up_stride + outs[None, :]
            gate = tl.load(gate_block, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(gate_block + OUT, mask=mask, other=0.0).to(tl.float32)
            gate += _expanded(
                h, h_row, count, splits, rows, place, slot, outs, in_module, act,
                BLOCK_M, BLOCK_N, BLOCK_R, MOST_SPLITS, WIDE_R,
            )  # fmt: skip
            up += _expanded(
                h, h_row, count, splits, rows, place + RECORD, slot, outs, in_module, act,
                BLOCK_M, BLOCK_N, BLOCK_R, MOST_SPLITS, WIDE_R,
            )  # fmt: skip
            value = gate / (1.0 + tl.exp(-gate)) * up
            tl.store(act + token[:, None] * OUT + outs[None, :], value, mask=mask)
