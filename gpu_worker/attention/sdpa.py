"""Attention in plain torch, which runs everywhere.

Decode rows are batched: their pages are gathered into one tensor, padded to the longest. Rows of
very different lengths go in separate batches, so that padding at most doubles the work. They are
computed with two batched products, since scaled_dot_product_attention took 2.8 times as long on
CPUs for one query in bf16 (1.3 times in fp32).

A chunk goes through scaled_dot_product_attention: at the start of its prompt with its own k and v,
later with the gathered pages.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.attention import AttentionPlan, StepSequences

SHORT_TOKENS = 256  # rows up to this length share a batch


class SdpaAttention:
    """The backend for one model and device.

    null_block  a block of the cache that is all zeros: padding of the page tables points to it,
                since 0 * NaN of another sequence's values would be NaN
    """

    reads_unwritten = True

    def __init__(
        self,
        *,
        kv_heads: int,
        block_tokens: int,
        null_block: int,
        sliding_window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._kv_heads = kv_heads
        self._block_tokens = block_tokens
        self._null_block = null_block
        self._window = sliding_window
        self._dtype = dtype
        self._device = device

    def plan(self, sequences: StepSequences) -> AttentionPlan:
        decode = sequences.decode_rows
        parts: list[_DecodeRows | _Chunk] = []
        if decode:
            size_class = np.ceil(sequences.lengths[:decode] / SHORT_TOKENS)
            size_class = np.ceil(np.log2(size_class)).astype(np.int64)
            for size in np.unique(size_class):
                parts.append(self._decode_rows(sequences, np.flatnonzero(size_class == size)))
        start = decode
        for sequence in range(decode, len(sequences.lengths)):
            end = start + int(sequences.query_lengths[sequence])
            parts.append(self._chunk(sequences, sequence, start, end))
            start = end
        return _SdpaPlan(parts)

    def _decode_rows(self, sequences: StepSequences, rows: NDArray[np.int64]) -> "_DecodeRows":
        lengths = sequences.lengths[rows]
        key_positions = np.arange(self._padded(int(lengths.max())))
        visible = key_positions[None, :] < lengths[:, None]
        windowed = visible
        if self._window is not None:
            windowed = visible & (key_positions[None, :] >= lengths[:, None] - self._window)
        return _DecodeRows(
            tokens=None if len(rows) == sequences.decode_rows else self._tensor(rows),
            pages=self._pages(sequences.page_table[rows], lengths),
            mask=self._mask(visible[:, None, None, :], torch.float32),
            windowed_mask=self._mask(windowed[:, None, None, :], torch.float32),
        )

    def _chunk(self, sequences: StepSequences, sequence: int, start: int, end: int) -> "_Chunk":
        length, count = int(sequences.lengths[sequence]), end - start
        whole = length == count  # nothing of the sequence lies in the cache only
        key_positions = np.arange(length if whole else self._padded(length))
        query_positions = np.arange(length - count, length)
        causal = key_positions[None, :] <= query_positions[:, None]
        windowed = causal
        if self._window is not None:
            windowed = causal & (key_positions[None, :] > query_positions[:, None] - self._window)
        bounded = self._window is not None and length > self._window
        pages = sequences.page_table[sequence : sequence + 1]
        return _Chunk(
            start=start,
            end=end,
            pages=None if whole else self._pages(pages, np.array([length])),
            mask=None if whole else self._mask(causal, self._dtype),
            windowed_mask=None if whole and not bounded else self._mask(windowed, self._dtype),
        )

    def _padded(self, length: int) -> int:
        return -(-length // self._block_tokens) * self._block_tokens

    def _pages(self, page_table: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """int64[2, sequences, kv_heads, blocks of the longest]: where the keys and the values of a
        head lie, in cache.view(-1, block_tokens * head_dim)."""
        blocks = -(-lengths // self._block_tokens)
        columns = np.arange(blocks.max())
        pages = np.where(
            columns[None, :] < blocks[:, None], page_table[:, : len(columns)], self._null_block
        )
        heads = np.arange(2 * self._kv_heads).reshape(2, 1, self._kv_heads, 1)
        return self._tensor(pages[None, :, None, :] * heads.size + heads)

    def _mask(self, visible: NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
        """What is added to the scores."""
        zeros = torch.zeros(visible.shape, dtype=dtype, device=self._device)
        return zeros.masked_fill_(self._tensor(~visible), float("-inf"))

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


class _DecodeRows:
    """Rows that feed one token each, in one batch.

    The heads that share a KV head stand as queries of one sequence, so nothing is repeated.
    """

    def __init__(
        self, *, tokens: Tensor | None, pages: Tensor, mask: Tensor, windowed_mask: Tensor
    ) -> None:
        self._tokens = tokens  # None: all decode rows, which are the first tokens
        self._pages = pages
        self._mask = mask  # fp32[rows, 1, 1, padded length]
        self._windowed_mask = windowed_mask

    def attend(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool
    ) -> None:
        rows, kv_heads, head_dim = len(self._mask), k.shape[1], k.shape[2]
        queries = q[:rows] if self._tokens is None else q.index_select(0, self._tokens)
        keys, values = _gather(cache, self._pages).flatten(1, 2)
        products = queries.reshape(rows * kv_heads, -1, head_dim) @ keys.transpose(1, 2)
        scores = torch.add(
            self._windowed_mask if windowed else self._mask,
            products.view(rows, kv_heads, -1, keys.shape[1]),
            alpha=head_dim**-0.5,
        )
        attended = scores.softmax(-1).to(q.dtype).flatten(0, 1) @ values
        if self._tokens is None:
            out[:rows] = attended.view(rows, -1)
        else:
            out.index_copy_(0, self._tokens, attended.view(rows, -1))


class _Chunk:
    """Consecutive tokens of one prompt."""

    def __init__(
        self,
        *,
        start: int,
        end: int,
        pages: Tensor | None,
        mask: Tensor | None,
        windowed_mask: Tensor | None,
    ) -> None:
        self._tokens = slice(start, end)
        self._pages = pages  # None: the chunk is all there is of its sequence
        self._mask = mask  # [tokens, keys]; None: causal
        self._windowed_mask = windowed_mask

    def attend(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool
    ) -> None:
        if self._pages is None:
            keys = k[self._tokens].transpose(0, 1)[None]
            values = v[self._tokens].transpose(0, 1)[None]
        else:
            keys, values = _gather(cache, self._pages)
        mask = self._windowed_mask if windowed else self._mask
        attended = F.scaled_dot_product_attention(
            q[self._tokens].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        out[self._tokens] = attended[0].transpose(0, 1).flatten(1)


class _SdpaPlan:
    def __init__(self, parts: list[_DecodeRows | _Chunk]) -> None:
        self._parts = parts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool) -> Tensor:
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        for part in self._parts:
            part.attend(out, q, k, v, cache, windowed)
        return out


def _gather(cache: Tensor, pages: Tensor) -> Tensor:
    """[2, sequences, kv_heads, tokens, head_dim] of one layer; keys, then values."""
    block_tokens, head_dim = cache.shape[3], cache.shape[4]
    chunks = cache.view(-1, block_tokens * head_dim).index_select(0, pages.flatten())
    return chunks.view(*pages.shape[:3], -1, head_dim)
