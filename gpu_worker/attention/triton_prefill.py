"""Paged attention of chunks of several sequences in one launch, in Triton.

Keys and values come from the cache, where those of the chunk lie already. A tile of queries and
the heads that share a KV head are the rows of one product, so that a short chunk fills it too.
The loop is that of FlashAttention-2 (arXiv:2307.08691).
"""

from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_worker.attention.triton_decode import LOG2_E
from gpu_worker.attention.triton_pages import token_offsets

NO_SEQUENCE = -1


class PrefillTuning(NamedTuple):
    """What may be tried out.

    block_m  rows of a tile, which are queries * heads that share a KV head
    block_n  tokens that a program looks at together
    """

    block_m: int = 128
    block_n: int = 64
    warps: int = 8
    stages: int = 3


def choose_tuning(
    query_lengths: NDArray[np.int64], heads: int, kv_heads: int, head_dim: int, itemsize: int
) -> PrefillTuning:
    """Large tiles where there are enough of them for the device; what fits into its memory."""
    programs = int(query_lengths.sum()) * heads // 128
    block_m = 128 if programs >= 132 else 64 if programs >= 66 else 32
    token_bytes = max(16, triton.next_power_of_2(head_dim)) * itemsize
    if token_bytes > 512:
        return PrefillTuning(min(block_m, 32), block_n=16, warps=4, stages=2)
    if token_bytes > 256:
        return PrefillTuning(min(block_m, 64), block_n=32, warps=4, stages=2)
    return PrefillTuning(block_m, block_n=64, warps=8 if block_m == 128 else 4)


def make_tiles(query_lengths: NDArray[np.int64], group: int, block_m: int) -> NDArray[np.int32]:
    """Who computes what: int32[tiles, 2], a sequence and the first row of its tile.

    The rows of a sequence are its queries times `group`, the heads that share a KV head. Its last
    tiles see the most keys and come first. Tiles of sequence -1 may follow, as padding.
    """
    counts = -(-query_lengths * group // block_m)
    sequence = np.repeat(np.arange(len(counts)), counts)
    tile = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(sequence))
    return np.stack((sequence, tile * block_m), 1).astype(np.int32)


def prefill(
    out: Tensor,
    q: Tensor,
    cache_layer: Tensor,
    page_table: Tensor,
    cu_query: Tensor,
    lengths: Tensor,
    tiles: Tensor,
    window: int | None,
    tuning: PrefillTuning,
    *,
    scale: float | None = None,
    pdl: bool = False,
) -> None:
    """Each query's attention to what the cache holds of its sequence up to it.

    out          [tokens, heads, head_dim], heads side by side
    q            [tokens, heads, head_dim], heads side by side
    cache_layer  [blocks, 2, kv_heads, block_tokens, head_dim], contiguous, keys before values
    page_table   int32[sequences, blocks]; beyond a sequence's length: undefined
    cu_query     int32[sequences + 1]: the queries of sequence i are q[cu_query[i]:cu_query[i + 1]]
    lengths      int32[sequences]: tokens in the cache; the queries are the last of them
    tiles        int32[tiles, 2], as make_tiles gives them for tuning.block_m
    """
    heads, head_dim = q.shape[1], q.shape[2]
    kv_heads = cache_layer.shape[2]
    if not len(tiles):
        return
    _prefill_kernel[(len(tiles), kv_heads)](
        out,
        q,
        cache_layer,
        page_table,
        cu_query,
        lengths,
        tiles,
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        out.stride(0),
        q.stride(0),
        page_table.stride(0),
        0 if window is None else window,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=cache_layer.shape[3],
        BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        WINDOWED=window is not None,
        PRECISION="ieee" if q.dtype.itemsize == 4 else "tf32",
        PDL=pdl,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        launch_pdl=pdl,
    )


@triton.jit
def _prefill_kernel(
    out_ptr,
    q_ptr,
    cache_ptr,
    page_ptr,
    cu_query_ptr,
    length_ptr,
    tile_ptr,
    scale,
    out_stride,
    q_stride,
    page_stride,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of rows and one KV head per program.

    Keys of a tile of rows:   first      inner             inner_end     end
                                |..masked..|.seen by all rows..|..masked..|
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_ptr + tl.program_id(0) * 2).to(tl.int64)
    if sequence < 0:
        return
    first_row = tl.load(tile_ptr + tl.program_id(0) * 2 + 1)
    first_token = tl.load(cu_query_ptr + sequence)
    queries = tl.load(cu_query_ptr + sequence + 1) - first_token
    length = tl.load(length_ptr + sequence)
    before = length - queries

    row, d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    position = before + query
    inside = (query < queries)[:, None] & (d < HEAD_DIM)[None, :]
    token = first_token.to(tl.int64) + query
    of_head = head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + (token * q_stride)[:, None] + of_head, inside, other=0)

    lowest = before + first_row // GROUP
    highest = tl.minimum(before + (first_row + BLOCK_M - 1) // GROUP, length - 1)
    end = highest + 1
    first = 0
    inner = 0
    inner_end = (lowest + 1) // BLOCK_N
    if WINDOWED:
        first = tl.maximum(lowest - window + 1, 0) // BLOCK_N
        inner = tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK_N)
        inner_end = tl.maximum(inner_end, first)
        inner = tl.minimum(tl.maximum(inner, first), inner_end)

    key_ptr = cache_ptr + kv_head * (BLOCK_TOKENS * HEAD_DIM) + d[None, :]
    page_row_ptr = page_ptr + sequence * page_stride
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOWED:
        acc, sums, largest = _attend(
            acc, sums, largest, q, key_ptr, page_row_ptr, position, first, inner, end, scale,
            window, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, BLOCK_N, BLOCK_D, WINDOWED, True, PRECISION,
        )  # fmt: skip
    acc, sums, largest = _attend(
        acc, sums, largest, q, key_ptr, page_row_ptr, position, inner, inner_end, end, scale,
        window, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, BLOCK_N, BLOCK_D, WINDOWED, False, PRECISION,
    )  # fmt: skip
    acc, sums, largest = _attend(
        acc, sums, largest, q, key_ptr, page_row_ptr, position, inner_end, tl.cdiv(end, BLOCK_N),
        end, scale, window, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, BLOCK_N, BLOCK_D, WINDOWED, True,
        PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(sums == 0, 1, sums)[:, None]
    out = out_ptr + (token * out_stride)[:, None] + of_head
    tl.store(out, acc.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _attend(
    acc,
    sums,
    largest,
    q,
    key_ptr,
    page_row_ptr,
    position,
    first_tile,
    last_tile,
    end,
    scale,
    window,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with the tiles of keys from first_tile to last_tile; there are `end` keys. Not MASKED:
    every row sees every key of them."""
    in_head = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    for tile in range(first_tile, last_tile):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        known = token < end
        offsets = token_offsets(
            page_row_ptr, tile * BLOCK_N, known, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, BLOCK_N
        )[:, None]
        loaded = in_head
        if MASKED:
            loaded = in_head & known[:, None]  # what lies elsewhere may be NaN
        k = tl.load(key_ptr + offsets, loaded, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            visible = token[None, :] <= position[:, None]
            if WINDOWED:
                visible = visible & (token[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        base = new_largest
        if MASKED:  # a row may have seen no key so far
            base = tl.where(new_largest == float("-inf"), 0, new_largest)
        shrink = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        v = tl.load(key_ptr + KV_HEADS * BLOCK_TOKENS * HEAD_DIM + offsets, loaded, other=0)
        sums = sums * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    return acc, sums, largest
