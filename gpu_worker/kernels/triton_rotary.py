"""Rotary embedding, the norm of q and k before it, and the write to the KV cache, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEADS_PER_PROGRAM = 16


def make_cos_sin(frequencies: Tensor, positions: int) -> Tensor:
    """The table of `rotate_and_store`.

    frequencies  fp32[head_dim / 2]
    returns      fp32[positions, head_dim], cosines before sines
    """
    at = torch.arange(positions, dtype=torch.float32, device=frequencies.device)
    angles = at[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    cos_sin: Tensor,
    cache_layer: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    qk_norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    pdl: bool = False,
) -> None:
    """Rotate q and k in place, in fp32, and write k and v to the cache.

    qkv             [tokens, (heads + 2 * kv_heads) * head_dim], rows may be strided; changed
    positions       int32 or int64[tokens]
    kv_slots        int32 or int64[tokens]: block * block_tokens + place; -1: neither this token's
                    q and k nor the cache are touched
    cos_sin         fp32[positions, head_dim], as make_cos_sin gives it
    cache_layer     [blocks, 2, kv_heads, block_tokens, head_dim], contiguous; changed
    qk_norm_weight  [heads + kv_heads, head_dim]: each head of q and k is normed before it is
                    rotated, and rounded before it is multiplied by this
    """
    tokens, all_heads = qkv.shape[0], heads + 2 * kv_heads
    if not tokens:
        return
    per_program = min(HEADS_PER_PROGRAM, triton.next_power_of_2(all_heads))
    _rotate_and_store_kernel[(tokens, triton.cdiv(all_heads, per_program))](
        qkv,
        positions,
        kv_slots,
        cos_sin,
        cache_layer,
        qkv if qk_norm_weight is None else qk_norm_weight,
        qkv.stride(0),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_TOKENS=cache_layer.shape[3],
        BLOCK_HEADS=per_program,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        NORM=qk_norm_weight is not None,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr,
    position_ptr,
    slot_ptr,
    cos_sin_ptr,
    cache_ptr,
    weight_ptr,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some heads of one token per program. A head is two halves, which lie HALF apart."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (pair < HALF)[None, :]
    rotated = inside & (head < HEADS + KV_HEADS)[:, None]
    stored = inside & (head >= HEADS)[:, None]

    within = head[:, None] * (2 * HALF) + pair[None, :]
    place = qkv_ptr + token * qkv_stride + within
    low = tl.load(place, inside, other=0)
    high = tl.load(place + HALF, inside, other=0)
    table = cos_sin_ptr + tl.load(position_ptr + token).to(tl.int64) * (2 * HALF) + pair
    cos = tl.load(table, pair < HALF, other=0)[None, :]
    sin = tl.load(table + HALF, pair < HALF, other=0)[None, :]

    x, y = low, high
    if NORM:
        exact_x, exact_y = x.to(tl.float32), y.to(tl.float32)
        squares = tl.sum(exact_x * exact_x + exact_y * exact_y, 1)
        scale = (1 / tl.sqrt_rn(squares / (2 * HALF) + eps))[:, None]
        weight_x = tl.load(weight_ptr + within, rotated, other=0).to(tl.float32)
        weight_y = tl.load(weight_ptr + within + HALF, rotated, other=0).to(tl.float32)
        x = ((exact_x * scale).to(low.dtype).to(tl.float32) * weight_x).to(low.dtype)
        y = ((exact_y * scale).to(low.dtype).to(tl.float32) * weight_y).to(low.dtype)
    exact_x, exact_y = x.to(tl.float32), y.to(tl.float32)
    turned_x = (exact_x * cos - exact_y * sin).to(low.dtype)
    turned_y = (exact_y * cos + exact_x * sin).to(low.dtype)
    tl.store(place, turned_x, rotated)
    tl.store(place + HALF, turned_y, rotated)

    block, in_block = slot // BLOCK_TOKENS, slot % BLOCK_TOKENS
    cache_head = block * (2 * KV_HEADS) + (head - HEADS)
    cache_place = (cache_head * BLOCK_TOKENS + in_block) * (2 * HALF)
    cached = cache_ptr + cache_place[:, None] + pair[None, :]
    tl.store(cached, tl.where(rotated, turned_x, low), stored)
    tl.store(cached + HALF, tl.where(rotated, turned_y, high), stored)
