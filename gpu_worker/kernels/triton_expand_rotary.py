"""Expand of q, k and v with what follows it: rotary embedding, and the way into the KV cache."""

import triton
import triton.language as tl

from gpu_worker.kernels.triton_expand_parts import (
    class_of,
    expanded,
    in_class,
    module_of,
    strip_of,
    whole_x,
)
from gpu_worker.kernels.triton_step import share


@triton.jit
def _heads_of_module(
    qkv_row, cache_row, c, s, mask, in_q, in_cache, h, h_row, count, start, rank, lora_b,
    before_module, head_start, head_end,
    HALF: tl.constexpr, HALF_P2: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, CLASS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The heads of q, k or v, for a class of ranks; written where in_q and in_cache say.

    cache_row  pointers [BLOCK_M] to where the module's head 0 of each token goes
    """
    rank = in_class(rank, CLASS)
    x = whole_x(h, h_row, count, start, rank, lora_b, BLOCK_M, BLOCK_R, CLASS)
    d = tl.arange(0, HALF_P2)
    even: tl.constexpr = HALF == HALF_P2
    for head in tl.range(head_start, head_end, num_stages=STAGES):
        column = (before_module + head) * (2 * HALF)
        block = qkv_row[:, None] + (column + d)[None, :]
        outs = head * (2 * HALF) + d
        before_low = tl.load(block, mask=mask, other=0.0)
        before_high = tl.load(block + HALF, mask=mask, other=0.0)
        acc = tl.zeros((BLOCK_M, HALF_P2), tl.float32)
        low = before_low.to(tl.float32) + expanded(
            acc, x, h, h_row, count, start, rank, lora_b, outs, head * (2 * HALF) + HALF,
            BLOCK_M, BLOCK_R, CLASS, even,
        )  # fmt: skip
        high = before_high.to(tl.float32) + expanded(
            acc, x, h, h_row, count, start, rank, lora_b, outs + HALF, (head + 1) * (2 * HALF),
            BLOCK_M, BLOCK_R, CLASS, even,
        )  # fmt: skip
        turned = low * c - high * s
        high = high * c + low * s
        tl.store(block, turned, mask=in_q)
        tl.store(block + HALF, high, mask=in_q)
        target = cache_row[:, None] + head * (BLOCK_TOKENS * 2 * HALF) + d[None, :]
        tl.store(target, turned, mask=in_cache)
        tl.store(target + HALF, high, mask=in_cache)


@triton.jit(do_not_specialize=["record"])
def expand_rotary_kernel(
    qkv, qkv_stride, cos, sin, positions, kv_slots, kv_cache, table, table_stride, record, tiles,
    tile_count, h_rows, h,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PROGRAMS: tl.constexpr, STAGES: tl.constexpr, RECORD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of outputs is one head, in two halves, which the embedding takes as pairs.

    qkv       [tokens, (HEADS + 2 * KV_HEADS) * 2 * HALF]; the q part becomes the rotated q
    cos, sin  fp32[positions, HALF]
    kv_cache  [blocks, 2, KV_HEADS, BLOCK_TOKENS, 2 * HALF], contiguous
    kv_slots  per token; a negative one is not written
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks: tl.constexpr = HEADS + 2 * KV_HEADS
    n = tl.load(tile_count)
    strips = share(n, PROGRAMS, blocks)
    of_strip = tl.cdiv(blocks, strips)
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HALF_P2)
    for item in range(tl.program_id(0), n * strips, tl.num_programs(0)):
        strip, first, count, slot, h_row, place = strip_of(
            item, tiles, h_rows, table, table_stride, record, strips, of_strip
        )
        token = first + rows
        valid = rows < count
        kv_slot = tl.load(kv_slots + token, mask=valid, other=-1).to(tl.int64)
        angle = tl.load(positions + token, mask=valid, other=0).to(tl.int64)[:, None] * HALF
        angle = angle + d[None, :]
        mask = valid[:, None] & (d < HALF)[None, :]
        cos_of_token = tl.load(cos + angle, mask=mask, other=0.0)
        sin_of_token = tl.load(sin + angle, mask=mask, other=0.0)
        qkv_row = qkv + token * qkv_stride
        for module in range(3):
            is_k = tl.minimum(module, 1)
            is_v = tl.maximum(module - 1, 0)
            heads = HEADS + is_k * (KV_HEADS - HEADS)
            before_module = is_k * HEADS + is_v * KV_HEADS
            start = tl.maximum(strip - before_module, 0)
            end = tl.minimum(strip + of_strip - before_module, heads)
            if start < end:
                c = tl.where(is_v == 1, 1.0, cos_of_token)
                s = tl.where(is_v == 1, 0.0, sin_of_token)
                in_q = mask & (is_k == 0)
                in_cache = mask & (kv_slot >= 0)[:, None] & (is_k == 1)
                cache_row = (kv_slot // BLOCK_TOKENS * 2 + is_v) * (KV_HEADS * BLOCK_TOKENS)
                cache_row = kv_cache + (cache_row + kv_slot % BLOCK_TOKENS) * (2 * HALF)
                lora_b, rank, rank_start = module_of(place + module * RECORD, slot, qkv)
                which = class_of(rank)
                if which == 0:
                    _heads_of_module(
                        qkv_row, cache_row, c, s, mask, in_q, in_cache, h, h_row, count,
                        rank_start, rank, lora_b, before_module, start, end,
                        HALF, HALF_P2, BLOCK_TOKENS, BLOCK_M, BLOCK_R, 0, STAGES,
                    )  # fmt: skip
                elif which == 1:
                    _heads_of_module(
                        qkv_row, cache_row, c, s, mask, in_q, in_cache, h, h_row, count,
                        rank_start, rank, lora_b, before_module, start, end,
                        HALF, HALF_P2, BLOCK_TOKENS, BLOCK_M, BLOCK_R, 1, STAGES,
                    )  # fmt: skip
                elif which == 2:
                    _heads_of_module(
                        qkv_row, cache_row, c, s, mask, in_q, in_cache, h, h_row, count,
                        rank_start, rank, lora_b, before_module, start, end,
                        HALF, HALF_P2, BLOCK_TOKENS, BLOCK_M, BLOCK_R, 2, 1,
                    )  # fmt: skip
                else:
                    _heads_of_module(
                        qkv_row, cache_row, c, s, mask, in_q, in_cache, h, h_row, count,
                        rank_start, rank, lora_b, before_module, start, end,
                        HALF, HALF_P2, BLOCK_TOKENS, BLOCK_M, BLOCK_R, 3, 1,
                    )  # fmt: skip
