"""Expand of q, k and v with what follows it: rotary embedding, and the way into the KV cache."""

import triton
import triton.language as tl

from gpu_worker.kernels.triton_expand import _expanded
from gpu_worker.kernels.triton_step import share


@triton.jit(do_not_specialize=["record"])
def expand_rotary_kernel(
    qkv,
    qkv_stride,
    cos,
    sin,
    positions,
    kv_slots,
    kv_cache,
    table,
    table_stride,
    record,
    tiles,
    tile_count,
    h_rows,
    entry_count,
    h,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P2: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE_R: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    SHRINK_PROGRAMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of outputs is one head, in two halves, which the embedding takes as pairs.

    qkv       [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM]; the q part becomes the rotated q
    cos, sin  fp32[positions, HALF]
    kv_cache  [blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM], contiguous
    kv_slots  per token; a negative one is not written
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks: tl.constexpr = HEADS + 2 * KV_HEADS
    n = tl.load(tile_count)
    splits = share(tl.load(entry_count), SHRINK_PROGRAMS, MOST_SPLITS)
    strips = share(n, PROGRAMS, blocks)
    of_strip = tl.cdiv(blocks, strips)
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HALF_P2)
    for item in range(tl.program_id(0), n * strips, tl.num_programs(0)):
        tile = item // strips
        strip = item % strips
        first = tl.load(tiles + tile * 3)
        count = tl.load(tiles + tile * 3 + 1)
        slot = tl.load(tiles + tile * 3 + 2)
        h_row = tl.load(h_rows + tile).to(tl.int64)
        place = table + tl.maximum(slot, 0).to(tl.int64) * table_stride + record
        token = (first + rows).to(tl.int64)
        valid = rows < count
        kv_slot = tl.load(kv_slots + token, mask=valid, other=-1).to(tl.int64)
        angle = tl.load(positions + token, mask=valid, other=0).to(tl.int64)[:, None] * HALF
        angle = angle + d[None, :]
        mask = valid[:, None] & (d < HALF)[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        start = strip * of_strip
        for index in range(tl.minimum(of_strip, blocks - start)):
            head = start + index
            is_k = (head >= HEADS).to(tl.int32)
            is_v = (head >= HEADS + KV_HEADS).to(tl.int32)
            kv_head = head - is_k * HEADS - is_v * KV_HEADS  # of a q head: its own number
            block = qkv + token[:, None] * qkv_stride + head * HEAD_DIM + d[None, :]
            low = tl.load(block, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(block + HALF, mask=mask, other=0.0).to(tl.float32)
            record_of_module = place + (is_k + is_v) * RECORD
            outs = kv_head * HEAD_DIM + d
            low += _expanded(
                h, h_row, count, splits, rows, record_of_module, slot, outs, d < HALF, qkv,
                BLOCK_M, HALF_P2, BLOCK_R, MOST_SPLITS, WIDE_R,
            )  # fmt: skip
            high += _expanded(
                h, h_row, count, splits, rows, record_of_module, slot, outs + HALF, d < HALF, qkv,
                BLOCK_M, HALF_P2, BLOCK_R, MOST_SPLITS, WIDE_R,
            )  # fmt: skip
            if is_v == 0:
                turned = low * c - high * s
                high = high * c + low * s
                low = turned
            if is_k == 0:
                tl.store(block, low, mask=mask)
                tl.store(block + HALF, high, mask=mask)
            else:
                cache_row = (kv_slot // BLOCK_TOKENS * 2 + is_v) * KV_HEADS + kv_head
                cache_row = cache_row * BLOCK_TOKENS + kv_slot % BLOCK_TOKENS
                target = kv_cache + cache_row[:, None] * HEAD_DIM + d[None, :]
                written = mask & (kv_slot >= 0)[:, None]
                tl.store(target, low, mask=written)
                tl.store(target + HALF, high, mask=written)
