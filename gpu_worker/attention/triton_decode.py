"""Paged attention of rows that feed one token each, in Triton, for CUDA graphs.

Long rows are cut into items, so that few of them fill the device too (flash-decoding, split KV).
What is an item is worked out on the device, once per step for all layers: the grid depends on the
number of rows alone, and hardly a program of it has nothing to do. Of a row's items, the one that
ends last puts them together, in their order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_worker.attention.triton_pages import token_offsets

LOG2_E = 1.4426950408889634
ITEM = 4  # int32 per item: row, first tile, end, items of the row


class DecodeTuning(NamedTuple):
    """What may be tried out.

    programs     that a step is cut into, about, when its rows are fewer
    least        tokens that an item has at least; a multiple of block_n
    block_n      tokens that a program looks at together
    """

    programs: int = 1056  # 8 for each of 132 SMs
    least: int = 128
    block_n: int = 64
    warps: int = 4
    stages: int = 3


def default_tuning(head_dim: int, dtype: torch.dtype) -> DecodeTuning:
    """What fits into the shared memory of every device from Ampere on."""
    token_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    return DecodeTuning(block_n=64 if token_bytes <= 256 else 32 if token_bytes <= 512 else 16)


class DecodePlan:
    """Owns the items of a step, and the memory where they meet.

    rows    that `decode` will be called for
    window  the sliding window of the layers that this is for
    """

    def __init__(
        self,
        *,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        tuning: DecodeTuning | None = None,
    ) -> None:
        self.tuning = default_tuning(head_dim, dtype) if tuning is None else tuning
        self.rows, self.heads, self.kv_heads = rows, heads, kv_heads
        self.window = window
        self.extra_items = max(1, -(-self.tuning.programs // kv_heads))
        most = rows + self.extra_items
        self.items = torch.zeros((most, ITEM), dtype=torch.int32, device=device)
        self.item_ends = torch.zeros(rows, dtype=torch.int32, device=device)
        self.arrived = torch.zeros((rows, kv_heads), dtype=torch.int32, device=device)
        self.partial = torch.empty((most, heads, head_dim), dtype=torch.float32, device=device)
        self.log_sums = torch.empty((most, heads), dtype=torch.float32, device=device)

    def update(self, lengths: Tensor, *, pdl: bool = False) -> None:
        """Once per step, before its first layer.

        lengths  int32[rows]: tokens in the cache, the one that is fed included; 0 is padding
        """
        _plan_kernel[(self.rows,)](
            lengths,
            self.items,
            self.item_ends,
            self.arrived,
            self.rows,
            self.extra_items,
            0 if self.window is None else self.window,
            LEAST=self.tuning.least,
            BLOCK_N=self.tuning.block_n,
            KV_HEADS=self.kv_heads,
            BLOCK_KV_HEADS=triton.next_power_of_2(self.kv_heads),
            BLOCK_ROWS=triton.next_power_of_2(self.rows),
            BLOCK_ITEMS=triton.next_power_of_2(self.extra_items + 1),
            ITEM_SIZE=ITEM,
            WINDOWED=self.window is not None,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )


def decode(
    out: Tensor,
    q: Tensor,
    cache_layer: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    plan: DecodePlan,
    *,
    scale: float | None = None,
    pdl: bool = False,
) -> None:
    """Each row's attention to what the cache holds of it.

    out          [rows, heads, head_dim], heads side by side; zeros for padding
    q            [rows, heads, head_dim], heads side by side
    cache_layer  [blocks, 2, kv_heads, block_tokens, head_dim], contiguous, keys before values
    page_table   int32[rows, blocks]; beyond a row's length: undefined
    lengths      int32[rows], which the plan was updated with
    """
    rows, heads, head_dim = q.shape
    kv_heads, tuning = cache_layer.shape[2], plan.tuning
    group = heads // kv_heads
    if rows != plan.rows:
        raise ValueError(f"a plan for {plan.rows} rows, and {rows} queries")
    _decode_kernel[(kv_heads, rows + plan.extra_items)](
        out,
        q,
        cache_layer,
        page_table,
        lengths,
        plan.items,
        plan.item_ends,
        plan.arrived,
        plan.partial,
        plan.log_sums,
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        out.stride(0),
        q.stride(0),
        page_table.stride(0),
        0 if plan.window is None else plan.window,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=cache_layer.shape[3],
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tuning.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        ITEM_SIZE=ITEM,
        WINDOWED=plan.window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        launch_pdl=pdl,
    )


@triton.jit
def _plan_kernel(
    length_ptr,
    item_ptr,
    item_end_ptr,
    arrived_ptr,
    rows,
    extra_items,
    window,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The items of one row per program. A row of n tiles has ceil(n / size) of them, and at least
    one; all rows together have at most rows + extra_items, because size is at least the number of
    all tiles / extra_items."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mine = tl.program_id(0)
    row = tl.arange(0, BLOCK_ROWS)
    length = tl.load(length_ptr + row, row < rows, other=0)
    first_tile = tl.zeros_like(length)
    if WINDOWED:
        first_tile = tl.maximum(length - window, 0) // BLOCK_N
    tiles = tl.cdiv(length, BLOCK_N) - first_tile
    size = tl.maximum(tl.cdiv(tl.sum(tiles, 0), extra_items), LEAST // BLOCK_N)
    counts = tl.where(row < rows, tl.maximum(tl.cdiv(tiles, size), 1), 0)
    first_item = tl.sum(tl.where(row < mine, counts, 0), 0)
    count = tl.sum(tl.where(row == mine, counts, 0), 0)
    start = tl.sum(tl.where(row == mine, first_tile, 0), 0)
    end = start + tl.sum(tl.where(row == mine, tiles, 0), 0)
    per_item = tl.cdiv(end - start, count)

    index = tl.arange(0, BLOCK_ITEMS)
    here = item_ptr + (first_item + index) * ITEM_SIZE
    inside = index < count
    tl.store(here, tl.zeros_like(index) + mine, inside)
    tl.store(here + 1, start + index * per_item, inside)
    tl.store(here + 2, tl.minimum(start + (index + 1) * per_item, end), inside)
    unused = (index >= count) & (first_item + index < rows + extra_items) & (mine == rows - 1)
    tl.store(here + 3, tl.where(inside, count, 0), inside | unused)
    tl.store(item_end_ptr + mine, first_item + count)
    head = tl.arange(0, BLOCK_KV_HEADS)
    tl.store(arrived_ptr + mine * KV_HEADS + head, tl.zeros_like(head), head < KV_HEADS)


@triton.jit
def _decode_kernel(
    out_ptr,
    q_ptr,
    cache_ptr,
    page_ptr,
    length_ptr,
    item_ptr,
    item_end_ptr,
    arrived_ptr,
    partial_ptr,
    log_sum_ptr,
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
    ITEM_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One item and KV head per program; the heads that share it are the rows of its products.

    scale is that of the scores, for powers of two.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    kv_head, item = tl.program_id(0), tl.program_id(1)
    row = tl.load(item_ptr + item * ITEM_SIZE).to(tl.int64)
    start = tl.load(item_ptr + item * ITEM_SIZE + 1)
    end = tl.load(item_ptr + item * ITEM_SIZE + 2)
    count = tl.load(item_ptr + item * ITEM_SIZE + 3)
    if count == 0:
        return
    length = tl.load(length_ptr + row)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)

    member, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (member < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    of_head = (kv_head * GROUP + member)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + row * q_stride + of_head, inside, other=0)

    key_ptr = cache_ptr + kv_head * (BLOCK_TOKENS * HEAD_DIM) + d[None, :]
    value_ptr = key_ptr + KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    page_row_ptr = page_ptr + row * page_stride
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # summed over its columns after the loop
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(start, end):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = token < length
        if WINDOWED:
            visible = visible & (token >= first)
        offsets = token_offsets(
            page_row_ptr, tile * BLOCK_N, visible, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, BLOCK_N
        )[:, None]
        loaded = visible[:, None] & (d < HEAD_DIM)[None, :]  # what lies elsewhere may be NaN
        k = tl.load(key_ptr + offsets, loaded, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))  # each tile has a visible token
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        v = tl.load(value_ptr + offsets, loaded, other=0)
        total = total * shrink[:, None] + weights
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    sums = tl.sum(total, 1)
    acc = acc / tl.where(sums == 0, 1, sums)[:, None]
    out = out_ptr + row * out_stride + of_head
    if count == 1:
        tl.store(out, acc.to(out_ptr.dtype.element_ty), inside)
    else:
        partial = partial_ptr + of_head
        log_sum = log_sum_ptr + kv_head * GROUP + member
        heads: tl.constexpr = KV_HEADS * GROUP
        here = item * heads
        tl.store(partial + here * HEAD_DIM, acc, inside)
        tl.store(log_sum + here, largest + tl.log2(sums), member < GROUP)
        tl.debug_barrier()  # all of it is written before one thread says so
        others = tl.atomic_add(arrived_ptr + row * KV_HEADS + kv_head, 1, sem="acq_rel")
        if others % count == count - 1:  # it counts on from layer to layer
            last = tl.load(item_end_ptr + row)
            joined = _join(
                partial, log_sum, last - count, last, inside, heads, HEAD_DIM, BLOCK_M, BLOCK_D
            )
            tl.store(out, joined.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _join(
    partial,
    log_sum,
    first,
    last,
    inside,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The attention to all items from first to last, of which each has normed its own.

    partial, log_sum  pointers into item 0, [BLOCK_M, BLOCK_D] and [BLOCK_M]; others wrote there
                      in this launch, so that what the L1 cache has of it may be old
    """
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    known = tl.max(inside.to(tl.int32), 1) > 0
    for item in range(first, last):
        here = item * HEADS
        part = tl.load(partial + here * HEAD_DIM, inside, other=0, cache_modifier=".cg")
        of_part = tl.load(log_sum + here, known, other=0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, of_part)
        shrink = tl.exp2(largest - new_largest)
        weight = tl.exp2(of_part - new_largest)
        sums = sums * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        largest = new_largest
    return acc / sums[:, None]
