"""What the kernels that expand have in common.

Each tile is shared by as many programs as there are to spare, each with a strip of neighbouring
blocks of outputs. Within a module of the strip, B's address, the rank and h stay the same, and the
loop over blocks has nothing to do but stream B and y, several blocks ahead. How wide h is in
registers is decided before that loop, by the class of the rank:

    NARROW    up to 16
    MEDIUM    up to 64
    WIDE      more: 64 at a time, within the loop over blocks
"""

import triton
import triton.language as tl

NARROW, MEDIUM, WIDE = range(3)
NARROW_RANKS = 16
MEDIUM_RANKS = 64


@triton.jit
def strip_of(item, tiles, h_rows, table, table_stride, record, strips, of_strip):
    """What a program needs of its item: first block, first token, tokens, slot, rows of h before
    the tile's, and the record of the group's first module."""
    tile = item // strips
    first = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    h_row = tl.load(h_rows + tile).to(tl.int64)
    place = table + tl.maximum(slot, 0).to(tl.int64) * table_stride + record
    return item % strips * of_strip, first.to(tl.int64), count, slot, h_row, place


@triton.jit
def module_of(record, slot, like):
    """B's address, rank, and where the rank starts in the stacked ones. Base model: rank 0."""
    address = tl.load(record + 1, eviction_policy="evict_last")
    rank = tl.load(record + 2, eviction_policy="evict_last").to(tl.int32)
    start = tl.load(record + 3, eviction_policy="evict_last").to(tl.int32)
    lora_b = tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)
    return lora_b, tl.where(slot >= 0, rank, 0), start


@triton.jit
def class_of(rank):
    return tl.where(rank <= 16, 0, tl.where(rank <= 64, 1, 2))


@triton.jit
def shrunk(
    h, h_row, count, start, rank, first, like,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, RANKS] of a tile's h: ranks `first` and on of a module, in B's dtype."""
    rows = tl.arange(0, BLOCK_M)
    r = first + tl.arange(0, RANKS)
    stacked = start + r
    row = (stacked // BLOCK_R * count)[None, :] + rows[:, None]
    place = row * BLOCK_R + (stacked % BLOCK_R)[None, :]
    mask = (rows < count)[:, None] & (r < rank)[None, :]
    return tl.load(h + h_row * BLOCK_R + place, mask=mask, other=0.0).to(like.dtype.element_ty)


@triton.jit
def lora_b_block(lora_b, rank, first, outs, OUT, RANKS: tl.constexpr, EVEN: tl.constexpr):
    """[RANKS, outs] of B transposed, as it lies in the pool: ranks `first` and on."""
    r = first + tl.arange(0, RANKS)
    mask = (r < rank)[:, None]
    if not EVEN:
        mask = mask & (outs < OUT)[None, :]
    return tl.load(
        lora_b + r[:, None].to(tl.int64) * OUT + outs[None, :],
        mask=mask,
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def whole_x(
    h, h_row, count, start, rank, like,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CLASS: tl.constexpr,
):  # fmt: skip
    """The h that stays in registers, [BLOCK_M, 16 or 64]; of classes that have none, nothing."""
    if CLASS == 0:
        x = shrunk(h, h_row, count, start, rank, 0, like, BLOCK_M, BLOCK_R, 16)
    elif CLASS == 1:
        x = shrunk(h, h_row, count, start, rank, 0, like, BLOCK_M, BLOCK_R, 64)
    else:
        x = tl.zeros((BLOCK_M, 16), like.dtype.element_ty)
    return x


@triton.jit
def expanded(
    acc, x, h, h_row, count, start, rank, lora_b, outs, OUT,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CLASS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc fp32[BLOCK_M, outs] += B h for a module; x is whole_x of its class."""
    if CLASS == 0:
        b = lora_b_block(lora_b, rank, 0, outs, OUT, 16, EVEN)
        acc = tl.dot(x, b, acc, input_precision="ieee")
    elif CLASS == 1:
        b = lora_b_block(lora_b, rank, 0, outs, OUT, 64, EVEN)
        acc = tl.dot(x, b, acc, input_precision="ieee")
    else:
        for first in range(0, rank, 64):
            b = lora_b_block(lora_b, rank, first, outs, OUT, 64, EVEN)
            xs = shrunk(h, h_row, count, start, rank, first, lora_b, BLOCK_M, BLOCK_R, 64)
            acc = tl.dot(xs, b, acc, input_precision="ieee")
    return acc
