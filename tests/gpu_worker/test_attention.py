"""The sdpa backend against the formula, over paged sequences of every sort."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpu_worker.attention import StepSequences
from gpu_worker.attention.sdpa import SHORT_TOKENS, SdpaAttention

KV_HEADS, GROUP, HEAD_DIM, BLOCK_TOKENS, BLOCKS = 2, 3, 8, 4, 300
CPU = torch.device("cpu")


class Sequence(NamedTuple):
    length: int
    queries: int


def expected(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The last len(q) tokens of one sequence: [queries, heads * head_dim]."""
    out = []
    for index in range(len(q)):
        end = len(k) - len(q) + index + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(KV_HEADS * GROUP):
            keys, values = k[start:end, head // GROUP], v[start:end, head // GROUP]
            out.append((keys @ q[index, head] / HEAD_DIM**0.5).softmax(-1) @ values)
    return torch.cat(out).view(len(q), -1)


def check(
    decode: list[int], chunks: list[Sequence], window: int | None, seed: int, windowed: bool = True
) -> None:
    """The cache is full of NaN wherever a sequence of the step has nothing written."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [*(Sequence(length, 1) for length in decode), *chunks]
    cache = torch.full((BLOCKS + 1, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM), torch.nan)
    cache[-1] = 0
    order = torch.randperm(BLOCKS, generator=generator).tolist()
    page_table = np.full((len(sequences), BLOCKS), BLOCKS - 1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, (length, queries) in enumerate(sequences):
        k, v = torch.randn((2, length, KV_HEADS, HEAD_DIM), generator=generator)
        blocks = [order.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        page_table[index, : len(blocks)] = blocks
        cache[blocks] = 0  # as the worker clears them
        for token in range(length):
            block, place = blocks[token // BLOCK_TOKENS], token % BLOCK_TOKENS
            cache[block, 0, :, place], cache[block, 1, :, place] = k[token], v[token]
        q = torch.randn((queries, KV_HEADS * GROUP, HEAD_DIM), generator=generator)
        parts.append((q, k, v))
    backend = SdpaAttention(
        kv_heads=KV_HEADS,
        block_tokens=BLOCK_TOKENS,
        null_block=BLOCKS,
        sliding_window=window,
        dtype=torch.float32,
        device=CPU,
    )
    plan = backend.plan(
        StepSequences(
            decode_rows=len(decode),
            query_lengths=np.array([s.queries for s in sequences]),
            lengths=np.array([s.length for s in sequences]),
            page_table=page_table,
        )
    )
    got = plan.attend(
        torch.cat([q for q, _, _ in parts]),
        torch.cat([k[len(k) - len(q) :] for q, k, _ in parts]),
        torch.cat([v[len(v) - len(q) :] for q, _, v in parts]),
        cache,
        windowed,
    )
    effective = window if windowed else None
    torch.testing.assert_close(got, torch.cat([expected(*part, effective) for part in parts]))


chunks = st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda c: Sequence(c[0] + c[1], c[1]))


@settings(max_examples=40, deadline=None)
@given(
    decode=st.lists(st.integers(1, 20), max_size=4),
    chunks=st.lists(chunks, max_size=3),
    window=st.sampled_from([None, 1, 3, 8, 100]),
    windowed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_is_the_formula(
    decode: list[int], chunks: list[Sequence], window: int | None, windowed: bool, seed: int
) -> None:
    if decode or chunks:
        check(decode, chunks, window, seed, windowed)


@pytest.mark.parametrize("window", [None, 5])
def test_rows_of_very_different_lengths(window: int | None) -> None:
    check([3, 2 * SHORT_TOKENS + 9, 7, SHORT_TOKENS, SHORT_TOKENS + 1], [], window, 0)
