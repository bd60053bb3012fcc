"""Where tokens lie in the paged cache, for kernels."""

import triton
import triton.language as tl


@triton.jit
def token_offsets(
    page_row_ptr,
    start,
    wanted,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The offsets of BLOCK_N tokens of a sequence in a layer of the cache: their keys of head 0.

    start    the first of them, a multiple of BLOCK_N
    wanted   which of them have an entry in the page table; of the others, the offset is in range
    returns  int64[BLOCK_N], or int32 plus a scalar, for [block, 2, kv head, token, head_dim]
    """
    within = tl.arange(0, BLOCK_N)
    page_size: tl.constexpr = 2 * KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    if BLOCK_TOKENS % BLOCK_N == 0:
        page = tl.load(page_row_ptr + start // BLOCK_TOKENS).to(tl.int64)
        offsets = page * page_size + (start % BLOCK_TOKENS + within) * HEAD_DIM
    else:
        token = start + within
        page = tl.load(page_row_ptr + token // BLOCK_TOKENS, wanted, other=0).to(tl.int64)
        offsets = page * page_size + (token % BLOCK_TOKENS) * HEAD_DIM
    return offsets
