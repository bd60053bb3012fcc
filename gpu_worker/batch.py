"""From a Step and the row table to the arrays of one forward pass: pure numpy.

Tokens stand in the order: decode rows, then chunks, each sorted by adapter, so that the tokens of
an adapter are neighbours. What is sampled comes out in the order that Step defines.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.attention import StepSequences
from gpu_worker.kernels.segments import Segment, make_segments
from gpu_worker.rows import NO_LOGPROBS, RowTable
from pipeline.messages import Step

Ints = NDArray[np.int64]


class PooledChunk(NamedTuple):
    """Tokens of a step that an embedding is made of."""

    row: int
    first: int  # of the step's tokens
    tokens: int
    is_last: bool  # its row's prompt ends with it


class HostBatch(NamedTuple):
    """The arrays of a step, on the host."""

    token_rows: Ints  # [tokens], the row of each
    positions: Ints  # [tokens]
    kv_slots: Ints  # [tokens]
    sampled: Ints  # [sampled], indices of tokens, in the order of StepDone
    sampled_rows: Ints  # [sampled]
    sequences: StepSequences
    segments: list[Segment]
    scored: Ints  # [scored], indices of tokens, in the order of StepDone
    pooled: list[PooledChunk]  # chunks of rows that are embedded, in the order of Step


def make_batch(step: Step, rows: RowTable) -> HostBatch:
    """Raises ValueError for a step that names a free row or lacks a block."""
    decode = np.frombuffer(step.decode_rows, np.int32).astype(np.int64)
    chunks = np.frombuffer(step.prefill, np.int32).reshape(-1, 3).astype(np.int64)
    decode_order = np.argsort(rows.slot[decode], kind="stable")
    chunk_order = np.argsort(rows.slot[chunks[:, 0]], kind="stable")

    row = np.concatenate((decode[decode_order], chunks[chunk_order, 0]))
    if (rows.length[row] == 0).any():
        raise ValueError("a step names a row that no sequence has")
    start = np.concatenate((rows.length[decode[decode_order]] - 1, chunks[chunk_order, 1]))
    count = np.concatenate((np.ones_like(decode), chunks[chunk_order, 2]))
    ends = np.cumsum(count)

    row_of_token = np.repeat(row, count)
    positions = np.arange(len(row_of_token)) - np.repeat(ends - count - start, count)
    sampled, sampled_rows = _sampled(decode_order, chunk_order, ends - 1, chunks, decode, rows)
    first_of_chunks = (ends - count)[len(decode) :]
    blocks = int(rows.blocks[row].max(initial=0))
    return HostBatch(
        token_rows=row_of_token,
        positions=positions,
        kv_slots=rows.kv_slots(row_of_token, positions),
        sampled=sampled,
        sampled_rows=sampled_rows,
        sequences=StepSequences(
            decode_rows=len(decode),
            query_lengths=count,
            lengths=start + count,
            page_table=rows.page_table[row, :blocks],
        ),
        segments=make_segments(rows.slot[row], count),
        scored=_scored(chunk_order, first_of_chunks, chunks, rows),
        pooled=_pooled(chunk_order, first_of_chunks, chunks, rows),
    )


def _sampled(
    decode_order: Ints, chunk_order: Ints, last: Ints, chunks: Ints, decode: Ints, rows: RowTable
) -> tuple[Ints, Ints]:
    """Tokens to sample after, and their rows: all decode rows, then chunks that are their row's
    last, but for those that are embedded. last[i] is the last token of the i-th sequence of the
    batch."""
    of_decode = np.empty_like(decode)
    of_decode[decode_order] = last[: len(decode)]
    of_chunk = np.empty_like(chunk_order)
    of_chunk[chunk_order] = last[len(decode) :]
    ending = _is_last(chunks, rows)
    if rows.pooling:
        ending &= ~rows.embedded[chunks[:, 0]]
    return (
        np.concatenate((of_decode, of_chunk[ending])),
        np.concatenate((decode, chunks[ending, 0])),
    )


def _scored(chunk_order: Ints, first: Ints, chunks: Ints, rows: RowTable) -> Ints:
    """Tokens that give the log-probability of the one after them, in the order of the chunks.
    first[i] is the first token of the i-th chunk of the batch."""
    row, start, count = chunks[:, 0], chunks[:, 1], chunks[:, 2]
    wanted = rows.prompt_top[row] != NO_LOGPROBS
    if not wanted.any():
        return np.empty(0, np.int64)
    first_of = np.empty_like(first)
    first_of[chunk_order] = first
    scored = np.where(wanted, np.minimum(count, rows.prompt_tokens[row] - 1 - start), 0).clip(min=0)
    return np.concatenate(
        [np.arange(at, at + n) for at, n in zip(first_of.tolist(), scored.tolist(), strict=True)]
    ).astype(np.int64)


def _pooled(chunk_order: Ints, first: Ints, chunks: Ints, rows: RowTable) -> list[PooledChunk]:
    """first[i] is the first token of the i-th chunk of the batch."""
    if not rows.pooling:
        return []
    embedded = rows.embedded[chunks[:, 0]]
    first_of = np.empty_like(first)
    first_of[chunk_order] = first
    is_last = _is_last(chunks, rows)
    return [
        PooledChunk(int(chunks[at, 0]), int(first_of[at]), int(chunks[at, 2]), bool(is_last[at]))
        for at in np.flatnonzero(embedded)
    ]


def _is_last(chunks: Ints, rows: RowTable) -> NDArray[np.bool_]:
    """[chunks], whether their rows' prompts end with them."""
    ends: NDArray[np.bool_] = chunks[:, 1] + chunks[:, 2] == rows.length[chunks[:, 0]]
    return ends
