"""Attention in Triton over the paged cache, for GPU nodes without flash-attn."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.attention import AttentionPlan, StepSequences
from gpu_worker.attention.triton_decode import DecodePlan, decode
from gpu_worker.attention.triton_prefill import (
    PrefillTuning,
    choose_tuning,
    make_tiles,
    prefill,
)


class TritonPagedAttention:
    """The backend for one model and device.

    pdl  programmatic dependent launch, for decode: a start overlaps its predecessor's end
    """

    reads_unwritten = False

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        sliding_window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        pdl: bool = False,
    ) -> None:
        self._pdl = pdl
        self._heads = heads
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self._window = sliding_window
        self._dtype = dtype
        self._device = device

    def plan(self, sequences: StepSequences) -> AttentionPlan:
        decode_rows = sequences.decode_rows
        page_table = self._tensor(sequences.page_table)
        lengths = self._tensor(sequences.lengths)
        parts: list[_DecodeRows | _Chunks] = []
        if decode_rows:
            parts.append(self._decode_rows(page_table[:decode_rows], lengths[:decode_rows]))
        if decode_rows < len(lengths):
            query_lengths = sequences.query_lengths[decode_rows:]
            parts.append(
                self._chunks(query_lengths, page_table[decode_rows:], lengths[decode_rows:])
            )
        return _TritonPlan(parts)

    def plan_decode(self, page_table: Tensor, lengths: Tensor) -> AttentionPlan:
        """For rows that feed one token each.

        page_table  int32[rows, blocks]
        lengths     int32[rows], with the token that is fed
        """
        return _TritonPlan([self._decode_rows(page_table, lengths)])

    def _decode_rows(self, page_table: Tensor, lengths: Tensor) -> "_DecodeRows":
        plan = self._decode_plan(lengths, None)
        windowed = plan if self._window is None else self._decode_plan(lengths, self._window)
        return _DecodeRows(page_table, lengths, plan, windowed, self._pdl)

    def _decode_plan(self, lengths: Tensor, window: int | None) -> DecodePlan:
        plan = DecodePlan(
            rows=len(lengths),
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            window=window,
            dtype=self._dtype,
            device=self._device,
        )
        plan.update(lengths, pdl=self._pdl)
        return plan

    def _chunks(
        self, query_lengths: NDArray[np.int64], page_table: Tensor, lengths: Tensor
    ) -> "_Chunks":
        tuning = choose_tuning(
            query_lengths, self._heads, self._kv_heads, self._head_dim, self._dtype.itemsize
        )
        tiles = make_tiles(query_lengths, self._heads // self._kv_heads, tuning.block_m)
        return _Chunks(
            tokens=int(query_lengths.sum()),
            page_table=page_table,
            cu_query=self._tensor(np.concatenate(([0], np.cumsum(query_lengths)))),
            lengths=lengths,
            tiles=self._tensor(tiles),
            window=self._window,
            tuning=tuning,
        )

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(self._device)


class _DecodeRows(NamedTuple):
    page_table: Tensor
    lengths: Tensor
    plan: DecodePlan
    windowed_plan: DecodePlan
    pdl: bool

    @property
    def tokens(self) -> int:
        return self.plan.rows

    def attend(self, out: Tensor, q: Tensor, cache: Tensor, windowed: bool) -> None:
        plan = self.windowed_plan if windowed else self.plan
        decode(out, q, cache, self.page_table, self.lengths, plan, pdl=self.pdl)


class _Chunks(NamedTuple):
    tokens: int
    page_table: Tensor
    cu_query: Tensor
    lengths: Tensor
    tiles: Tensor
    window: int | None
    tuning: PrefillTuning

    def attend(self, out: Tensor, q: Tensor, cache: Tensor, windowed: bool) -> None:
        prefill(
            out,
            q,
            cache,
            self.page_table,
            self.cu_query,
            self.lengths,
            self.tiles,
            self.window if windowed else None,
            self.tuning,
        )


class _TritonPlan:
    def __init__(self, parts: list[_DecodeRows | _Chunks]) -> None:
        self._parts = parts  # in the order of their tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        start = 0
        for part in self._parts:
            tokens = slice(start, start + part.tokens)
            part.attend(out[tokens], q[tokens], cache, windowed)
            start = tokens.stop
        return out.flatten(1)
