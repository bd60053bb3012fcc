"""Shrink: h = A x for all modules of a group, whose As are one matrix.

Each entry (a tile of tokens and a block of its adapter's ranks) is shared by as many programs as
there are to spare, each with its part of the input features. The program that is done last sums up
what the others left in `parts`, always in the same order, so that a result can be had again.

h has rows of BLOCK_R: entry after entry, in each its tokens; in the compute dtype, for the expand
kernel's tensor cores. `parts` is the same in fp32, with an entry's parts in a row.
"""

import triton
import triton.language as tl

from gpu_worker.kernels.triton_step import share


@triton.jit
def _combine(
    acc, h_block, parts, arrivals, h_row, split, splits, count, place, mask,
    BLOCK_R: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """Leave this program's part; if all are there, h is their sum."""
    parts += h_row * splits * BLOCK_R
    of_split = count * BLOCK_R
    tl.store(parts + split * of_split + place, acc, mask=mask)
    tl.debug_barrier()  # the whole program's stores, before one thread says that they are done
    if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == splits - 1:
        total = tl.load(parts + place, mask=mask, other=0.0, cache_modifier=".cg")
        for other in tl.static_range(1, MOST_SPLITS):
            present = mask & (other < splits)
            total += tl.load(
                parts + other * of_split + place, mask=present, other=0.0, cache_modifier=".cg"
            )
        tl.store(h_block, total, mask=mask)
        tl.store(arrivals, 0)


@triton.jit(do_not_specialize=["record"])
def shrink_kernel(
    x, x_stride, table, table_stride, record, entries, entry_count, h, parts, arrivals,
    K: tl.constexpr, MODULES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, MOST_SPLITS: tl.constexpr, PROGRAMS: tl.constexpr,
    ENTRY_SIZE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """arrivals is int32 per entry, all 0 before and after."""
    items = tl.load(entry_count)
    splits = share(items, PROGRAMS, MOST_SPLITS)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    kk = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), items * splits, tl.num_programs(0)):
        entry = entries + (item // splits).to(tl.int64) * ENTRY_SIZE
        split = item % splits
        first = tl.load(entry)
        count = tl.load(entry + 1)
        slot = tl.load(entry + 2)
        rank_start = tl.load(entry + 3)
        h_row = tl.load(entry + 4).to(tl.int64)

        place = table + tl.maximum(slot, 0).to(tl.int64) * table_stride + record
        lora_a = tl.load(place, eviction_policy="evict_last")
        last = place + (MODULES - 1) * RECORD
        ranks = tl.load(last + 2, eviction_policy="evict_last") + tl.load(
            last + 3, eviction_policy="evict_last"
        )
        ranks = tl.where(slot >= 0, ranks, 0).to(tl.int32)
        in_tile = m < count
        in_rank = rank_start + r < ranks
        row = (first + m).to(tl.int64)
        x_row = x + row * x_stride
        a_row = tl.multiple_of(lora_a.to(tl.pointer_type(x.dtype.element_ty)), 16)
        a_row += (rank_start + r).to(tl.int64) * K
        start = split * part
        end = tl.minimum(start + part, K)
        if rank_start >= ranks:
            end = start
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, end - start, BLOCK_K):
            ks = start + k + kk
            x_mask = in_tile[:, None]
            a_mask = in_rank[:, None]
            if K % BLOCK_K != 0:
                x_mask = x_mask & (ks < K)[None, :]
                a_mask = a_mask & (ks < K)[None, :]
            a = tl.load(
                a_row[:, None] + ks[None, :], mask=a_mask, other=0.0, eviction_policy="evict_first"
            )
            xs = tl.load(x_row[:, None] + ks[None, :], mask=x_mask, other=0.0)
            acc = tl.dot(xs, tl.trans(a), acc, input_precision="ieee")
        in_block = m[:, None] * BLOCK_R + r[None, :]
        h_block = h + h_row * BLOCK_R + in_block
        mask = in_tile[:, None] & in_rank[None, :]
        if splits == 1:
            tl.store(h_block, acc, mask=mask)
        elif rank_start < ranks:
            _combine(
                acc, h_block, parts, arrivals + item // splits, h_row, split, splits, count,
                in_block, mask, BLOCK_R, MOST_SPLITS,
            )  # fmt: skip
