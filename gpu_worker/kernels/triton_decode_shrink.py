"""Shrink for decode steps: h = A x for all modules of a group, into the step's columns.

An entry (a tile of rows and a block of its adapter's ranks) is shared by as many programs as there
are to spare, each with its part of the input features. The program that is done last sums up what
the others left in `parts`, always in the same order, so that a result can be had again.
"""

import triton
import triton.language as tl

from gpu_worker.kernels.triton_step import share


@triton.jit(do_not_specialize=["record", "module"])
def decode_shrink_kernel(
    x, table, table_stride, record, module, entries, entry_counts, h, parts, arrivals,
    most_entries, most_columns, most_rows,
    K: tl.constexpr, MODULES: tl.constexpr, BLOCK_M: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr, MOST_SPLITS: tl.constexpr, PROGRAMS: tl.constexpr,
    ENTRY_SIZE: tl.constexpr, RECORD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    x         [rows, K], contiguous
    record    of the group's first module, whose number is `module`
    h         [modules, most_rows, most_columns]
    parts     fp32[PROGRAMS, BLOCK_M, RANKS]
    arrivals  int32[PROGRAMS], all 0 before and after
    """
    count_0 = tl.load(entry_counts + module)
    items = count_0
    count_1 = 0
    if MODULES > 1:
        count_1 = tl.load(entry_counts + module + 1)
        items += count_1
    if MODULES > 2:
        items += tl.load(entry_counts + module + 2)
    splits = share(items, PROGRAMS, MOST_SPLITS)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANKS)
    kk = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), items * splits, tl.num_programs(0)):
        number = item // splits
        split = item % splits
        in_1 = (number >= count_0).to(tl.int32)
        in_2 = (number >= count_0 + count_1).to(tl.int32)
        which = in_1 + in_2
        number -= in_1 * count_0 + in_2 * count_1
        entry = entries + ((module + which).to(tl.int64) * most_entries + number) * ENTRY_SIZE
        first = tl.load(entry)
        count = tl.load(entry + 1)
        slot = tl.load(entry + 2)
        rank_start = tl.load(entry + 3)
        column = tl.load(entry + 4)
        place = table + slot.to(tl.int64) * table_stride + record + which * RECORD
        lora_a = tl.load(place, eviction_policy="evict_last")
        rank = tl.load(place + 2, eviction_policy="evict_last").to(tl.int32)
        in_tile = m < count
        in_rank = rank_start + r < rank
        row = (first + m).to(tl.int64)
        x_row = x + row * K
        a_row = tl.multiple_of(lora_a.to(tl.pointer_type(x.dtype.element_ty)), 16)
        a_row += (rank_start + r).to(tl.int64) * K
        if PDL:  # all above was there before the step's first layer
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        start = split * part
        end = tl.minimum(start + part, K)
        end = tl.where(rank_start < rank, end, start)
        acc = tl.zeros((BLOCK_M, RANKS), tl.float32)
        for k in range(start, end, BLOCK_K):
            ks = k + kk
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
        target = h + ((module + which).to(tl.int64) * most_rows + row[:, None]) * most_columns
        target += (column + r)[None, :]
        mask = in_tile[:, None] & (r >= 0)[None, :]
        if splits == 1:
            tl.store(target, acc, mask=mask)
        else:
            of_item = parts + (item - split) * (BLOCK_M * RANKS)
            place_in_part = m[:, None] * RANKS + r[None, :]
            tl.store(of_item + split * (BLOCK_M * RANKS) + place_in_part, acc)
            tl.debug_barrier()  # the program's stores, before one thread says that they are done
            arrived = tl.atomic_add(arrivals + item // splits, 1, sem="acq_rel", scope="gpu")
            if arrived == splits - 1:
                total = tl.load(of_item + place_in_part, cache_modifier=".cg")
                for other in tl.static_range(1, MOST_SPLITS):
                    total += tl.load(
                        of_item + other * (BLOCK_M * RANKS) + place_in_part,
                        mask=(other < splits) & mask,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                tl.store(target, total, mask=mask)
                tl.store(arrivals + item // splits, 0)
    if PDL:  # a program without items as well
        tl.extra.cuda.gdc_wait()
