"""Linear layers of decode steps, with the adapters of all rows in the same multiplication.

y = W x + B h, where the columns of B are the ranks of all the step's adapters (triton_columns):
after the input features, the ranks are multiplied as if they were more of them. So LoRA costs the
bytes of the adapters, and y is written once.

A program has BLOCK_N outputs of up to BLOCK_M rows. The weight is what a decode step reads most of,
and passes once through shared memory, brought there by the bulk copy engine. Where the outputs are
too few to keep every multiprocessor busy, the input features are cut into splits, whose sums
whoever reads y adds up.

With programmatic dependent launch, a step with adapters starts on W x while their shrink still
runs, and waits for it only before the first rank. The x is complete by then, because the shrink has
waited for it before it lets this kernel start.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of_b(address, outs, like, wanted):
    """[ranks, outs] of the rows of B' at these addresses, if wanted."""
    row = tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)
    return tl.load(row[:, None] + outs[None, :], mask=wanted, other=0.0)


@triton.jit(do_not_specialize=["module"])
def linear_kernel(
    x, weight, bias, y, rows_end, h, addresses, counts, module, most_columns, most_rows,
    like,
    N: tl.constexpr, K: tl.constexpr, OUT_0: tl.constexpr, OUT_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, RANKS: tl.constexpr, RANK_STAGES: tl.constexpr, MODULES: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    x          descriptor of [rows, K] in blocks [BLOCK_M, BLOCK_K]
    weight     descriptor of [N, K] in blocks [BLOCK_N, BLOCK_K]
    y          [rows, N]; with splits fp32[SPLITS, rows, N]; GATED: [rows, N / 2], silu(gate) * up
    h          descriptor of [modules * most_rows, most_columns] in blocks [BLOCK_M, RANKS]
    addresses  of this layer, [modules, most_columns]
    like       a pointer to elements like B's
    module     number of the group's first module, whose outputs are OUT_0; the next one's are OUT_1
    """
    if PDL and not LORA:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    outputs: tl.constexpr = N // 2 if GATED else N
    tiles: tl.constexpr = outputs // BLOCK_N
    blocks = tl.cdiv(rows_end, BLOCK_M)
    program = tl.program_id(0)
    first_row = program % blocks * BLOCK_M
    n = program // blocks % tiles * BLOCK_N
    split = program // blocks // tiles
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    of_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    start = split * of_split
    end = tl.minimum(start + of_split, steps)
    outs = n + tl.arange(0, BLOCK_N)

    if LORA:
        which = 0
        column = outs
        if MODULES > 1 and not GATED:
            in_1 = (n >= OUT_0).to(tl.int32)
            in_2 = (n >= OUT_0 + OUT_1).to(tl.int32)
            which = in_1 + in_2
            column = outs - in_1 * OUT_0 - in_2 * OUT_1
        of_module = addresses + (module + which).to(tl.int64) * most_columns
        of_up = of_module + most_columns
        h_row = (module + which) * most_rows + first_row
        first = split * RANKS
        count = tl.load(counts + module + which)  # asked for early, and needed late
        address = tl.load(of_module + first + tl.arange(0, RANKS))
        if GATED:
            up_address = tl.load(of_up + first + tl.arange(0, RANKS))

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    for step in tl.range(start, end, num_stages=STAGES):
        k = step * BLOCK_K
        xs = tl.trans(x.load([first_row, k]))
        acc = tl.dot(weight.load([n, k]), xs, acc, input_precision="ieee")
        if GATED:
            up = tl.dot(weight.load([outputs + n, k]), xs, up, input_precision="ieee")

    if LORA:
        any_ranks = first < count
        b = _rows_of_b(address, column, like, any_ranks)
        if GATED:
            b_up = _rows_of_b(up_address, column, like, any_ranks)
        if PDL:
            tl.extra.cuda.gdc_wait()
        if any_ranks:
            hs = tl.trans(h.load([h_row, first]))
            acc = tl.dot(tl.trans(b), hs, acc, input_precision="ieee")
            if GATED:
                hs = tl.trans(h.load([h_row + most_rows, first]))
                up = tl.dot(tl.trans(b_up), hs, up, input_precision="ieee")
        for c in tl.range(first + SPLITS * RANKS, count, SPLITS * RANKS, num_stages=RANK_STAGES):
            hs = tl.trans(h.load([h_row, c]))
            b = _rows_of_b(tl.load(of_module + c + tl.arange(0, RANKS)), column, like, True)
            acc = tl.dot(tl.trans(b), hs, acc, input_precision="ieee")
            if GATED:
                hs = tl.trans(h.load([h_row + most_rows, c]))
                b = _rows_of_b(tl.load(of_up + c + tl.arange(0, RANKS)), column, like, True)
                up = tl.dot(tl.trans(b), hs, up, input_precision="ieee")
    if BIAS:  # noqa: SIM102, the other condition is on the device
        if split == 0:
            acc += tl.load(bias + outs).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(bias + outputs + outs).to(tl.float32)[:, None]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    rows = first_row + tl.arange(0, BLOCK_M)
    target = y + (split.to(tl.int64) * rows_end + rows[:, None]) * outputs + outs[None, :]
    tl.store(target, tl.trans(acc).to(y.dtype.element_ty), mask=(rows < rows_end)[:, None])
