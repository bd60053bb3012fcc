"""Attention by flash-attn (Dao, arXiv:2307.08691), on pages of the KV cache.

Its paged kernels want pages of a multiple of 256 tokens.
"""

from typing import Any

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.attention import StepSequences
from gpu_worker.device import to_device

PAGE_TOKENS = 256


class FlashAttention:
    """The backend for one model and device."""

    reads_unwritten = False

    def __init__(self, *, sliding_window: int | None, device: torch.device) -> None:
        self._window = None if sliding_window is None else (sliding_window - 1, 0)
        self._device = device

    def plan(self, sequences: StepSequences) -> "_MixedPlan":
        decode = sequences.decode_rows
        pages = self._tensor(sequences.page_table.astype(np.int32))
        return _MixedPlan(
            decode=self.plan_decode(pages[:decode], self._int32(sequences.lengths[:decode])),
            decode_rows=decode,
            chunks=self._plan_chunks(sequences, pages[decode:]),
        )

    def plan_decode(self, page_table: Tensor, lengths: Tensor) -> "_DecodePlan":
        """For rows that feed one token each.

        page_table  int32[rows, blocks]
        lengths     int32[rows], with the token that is fed
        """
        return _DecodePlan(page_table, lengths, self._window)

    def _plan_chunks(self, sequences: StepSequences, pages: Tensor) -> "_ChunkPlan | None":
        queries = sequences.query_lengths[sequences.decode_rows :]
        lengths = sequences.lengths[sequences.decode_rows :]
        if not len(queries):
            return None
        return _ChunkPlan(
            page_table=pages,
            cu_queries=self._int32(np.append(0, queries.cumsum())),
            cu_keys=self._int32(np.append(0, lengths.cumsum())),
            max_queries=int(queries.max()),
            max_keys=int(lengths.max()),
            window=self._window,
        )

    def _int32(self, values: NDArray[np.int64]) -> Tensor:
        return self._tensor(values.astype(np.int32))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return to_device(array, self._device)


class _DecodePlan:
    def __init__(self, page_table: Tensor, lengths: Tensor, window: tuple[int, int] | None) -> None:
        self._page_table = page_table
        self._lengths = lengths
        self._window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool) -> Tensor:
        keys, values = _pages(cache)
        attended: Tensor = flash_attn_with_kvcache(
            q[:, None],
            keys,
            values,
            cache_seqlens=self._lengths,
            block_table=self._page_table,
            causal=True,
            window_size=_window(self._window, windowed),
        )
        return attended.flatten(1)


class _ChunkPlan:
    def __init__(
        self,
        *,
        page_table: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        max_queries: int,
        max_keys: int,
        window: tuple[int, int] | None,
    ) -> None:
        self._page_table = page_table
        self._cu_queries = cu_queries
        self._cu_keys = cu_keys
        self._max_queries = max_queries
        self._max_keys = max_keys
        self._window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool) -> Tensor:
        keys, values = _pages(cache)
        attended: Tensor = flash_attn_varlen_func(
            q,
            keys,
            values,
            self._cu_queries,
            self._cu_keys,
            self._max_queries,
            self._max_keys,
            causal=True,
            window_size=_window(self._window, windowed),
            block_table=self._page_table,
        )
        return attended.flatten(1)


class _MixedPlan:
    """Decode rows, then chunks."""

    def __init__(self, *, decode: _DecodePlan, decode_rows: int, chunks: _ChunkPlan | None) -> None:
        self._decode = decode
        self._decode_rows = decode_rows
        self._chunks = chunks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool) -> Tensor:
        rows = self._decode_rows
        if self._chunks is None:
            return self._decode.attend(q, k, v, cache, windowed)
        chunks = self._chunks.attend(q[rows:], k[rows:], v[rows:], cache, windowed)
        if not rows:
            return chunks
        decoded = self._decode.attend(q[:rows], k[:rows], v[:rows], cache, windowed)
        return torch.cat((decoded, chunks))


def _pages(cache: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, block_tokens, kv_heads, head_dim] each, as views."""
    keys, values = cache.unbind(1)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _window(window: tuple[int, int] | None, windowed: bool) -> tuple[int, int]:
    return window if windowed and window is not None else (-1, -1)
