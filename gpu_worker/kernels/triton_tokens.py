"""Tokens on the device: from the history of a row to its embedding, from logits to the history.

history is int32[rows, row_tokens + 1]: the tokens of each running sequence. A row of -1 is padding,
so that a CUDA graph of a fixed batch size serves smaller batches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pipeline.messages import NOT_FINITE

EMBED_BLOCK = 1024
GREEDY_BLOCK = 4096
GREEDY_PROGRAMS = 1056  # 8 for each of 132 SMs


def embed(
    history: Tensor,
    rows: Tensor,
    positions: Tensor,
    embedding: Tensor,
    out: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """out[i] = embedding[history[rows[i], positions[i]]]; zeros where rows[i] is -1.

    rows, positions  int32 or int64[tokens]
    embedding        [vocabulary, hidden]
    out              [tokens, hidden]
    """
    tokens, hidden = out.shape
    if not tokens:
        return
    _embed_kernel[(tokens, triton.cdiv(hidden, EMBED_BLOCK))](
        history,
        rows,
        positions,
        embedding,
        out,
        history.stride(0),
        embedding.stride(0),
        out.stride(0),
        hidden,
        BLOCK=EMBED_BLOCK,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def greedy(
    logits: Tensor,
    rows: Tensor,
    lengths: Tensor,
    history: Tensor,
    out: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """The most likely token of each row, the lowest of equals, into `out` and the history.

    logits   [n, vocabulary], rows may be strided
    rows     int32 or int64[n], into history
    lengths  int32 or int64[n]: the token becomes history[rows[i], lengths[i]]
    history  changed; a token that is not finite is token 0 there, as RowTable.append_tokens has it
    out      int32[n]: the token, or -1 where the largest logit is not finite, where there is a
             NaN, and for padding
    """
    n, vocabulary = logits.shape
    if not n:
        return
    parts = greedy_parts(n, vocabulary)
    scores = torch.empty((n, parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((n, parts), dtype=torch.int32, device=logits.device)
    width = triton.cdiv(triton.cdiv(vocabulary, parts), GREEDY_BLOCK) * GREEDY_BLOCK
    _largest_kernel[(n, parts)](
        logits,
        rows,
        scores,
        tokens,
        logits.stride(0),
        vocabulary,
        width,
        parts,
        BLOCK=GREEDY_BLOCK,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    _choose_kernel[(n,)](
        scores,
        tokens,
        rows,
        lengths,
        history,
        out,
        history.stride(0),
        parts,
        BLOCK=triton.next_power_of_2(parts),
        NOT_FINITE=NOT_FINITE,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )


def greedy_parts(n: int, vocabulary: int) -> int:
    """Into how many parts a row of logits is cut, so that few rows fill the device too."""
    blocks: int = triton.cdiv(vocabulary, GREEDY_BLOCK)
    each: int = triton.cdiv(blocks, max(1, min(blocks, GREEDY_PROGRAMS // n)))
    return int(triton.cdiv(blocks, each))


@triton.jit
def _embed_kernel(
    history_ptr,
    row_ptr,
    position_ptr,
    embedding_ptr,
    out_ptr,
    history_stride,
    embedding_stride,
    out_stride,
    hidden,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK values of one token per program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + index).to(tl.int64)
    known = row >= 0
    position = tl.load(position_ptr + index, known, other=0)
    token = tl.load(history_ptr + row * history_stride + position, known, other=0).to(tl.int64)
    place = embedding_ptr + token * embedding_stride + column
    values = tl.load(place, known & (column < hidden), other=0)
    tl.store(out_ptr + index * out_stride + column, values, column < hidden)


@triton.jit
def _largest_kernel(
    logits_ptr,
    row_ptr,
    score_ptr,
    token_ptr,
    logits_stride,
    vocabulary,
    width,
    parts,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The largest of `width` logits of a row per program. NaN counts as infinity."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(row_ptr + index) < 0:
        return
    logits_ptr += index * logits_stride
    start = part * width
    column = start + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_column = column
    for offset in range(0, tl.minimum(width, vocabulary - start), BLOCK):
        here = column + offset
        score = tl.load(logits_ptr + here, here < vocabulary, other=float("-inf")).to(tl.float32)
        score = tl.where(score != score, float("inf"), score)
        best_column = tl.where(score > best, here, best_column)
        best = tl.maximum(best, score)
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, best_column, vocabulary), 0)
    tl.store(score_ptr + index * parts + part, largest)
    tl.store(token_ptr + index * parts + part, token)


@triton.jit
def _choose_kernel(
    score_ptr,
    token_ptr,
    row_ptr,
    length_ptr,
    history_ptr,
    out_ptr,
    history_stride,
    parts,
    BLOCK: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The largest of a row's parts per program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + index).to(tl.int64)
    if row < 0:
        tl.store(out_ptr + index, NOT_FINITE)
        return
    part = tl.arange(0, BLOCK)
    score = tl.load(score_ptr + index * parts + part, part < parts, other=float("-inf"))
    token = tl.load(token_ptr + index * parts + part, part < parts, other=0)
    largest = tl.max(score, 0)
    chosen = tl.min(tl.where((score == largest) & (part < parts), token, 2147483647), 0)
    finite = (largest < float("inf")) & (largest > float("-inf"))
    length = tl.load(length_ptr + index).to(tl.int64)
    tl.store(out_ptr + index, tl.where(finite, chosen, NOT_FINITE))
    tl.store(history_ptr + row * history_stride + length, tl.where(finite, chosen, 0))
