"""Embeddings: the hidden states of prompts after the final norm, pooled into one vector each."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.batch import PooledChunk
from gpu_worker.device import to_device
from gpu_worker.layers.linear import Linear
from pipeline.messages import Pooling, PoolingKind

NAN = float("nan")


class Means:
    """The sums over the tokens so far of rows whose mean is wanted and whose prompts come in
    several chunks: float32[hidden] each, on the device. They are dropped with their rows."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def forget(self, rows: Sequence[int]) -> None:
        if self._sums:
            for row in rows:
                self._sums.pop(row, None)

    def add(self, row: int, states: Tensor, *, is_last: bool) -> Tensor:
        """The sum with that of [tokens, hidden] added; after the last it is kept no longer."""
        added = states.sum(0, dtype=torch.float32)
        before = self._sums.pop(row, None)
        if before is not None:
            added += before
        if not is_last:
            self._sums[row] = added
        return added


class StepEmbeddings:
    """Those of one step, which takes them out of its hidden states.

    pooling  by row
    lengths  tokens of each prompt, by row
    """

    def __init__(
        self,
        chunks: Sequence[PooledChunk],
        *,
        pooling: Mapping[int, Pooling],
        lengths: Mapping[int, int],
        means: Means,
    ) -> None:
        self._chunks = chunks
        self._pooling = pooling
        self._lengths = lengths
        self._means = means
        self.embeddings: Tensor | None = None  # float32[n, hidden] of the last chunks, once taken

    def take(self, hidden: Tensor, lm_head: Linear) -> None:
        """[tokens, hidden] of the step."""
        sums = [self._sum(chunk, hidden) for chunk in self._chunks]
        last = [chunk.row for chunk in self._chunks if chunk.is_last]
        if not last:
            return
        counts = np.array([self._states(row) for row in last], np.float32)
        normalized = np.array([self._pooling[row].normalize for row in last])
        embeddings = torch.stack([one for one in sums if one is not None])
        embeddings /= to_device(counts, hidden.device)[:, None]
        units = F.normalize(embeddings, dim=-1)
        made = torch.where(to_device(normalized, hidden.device)[:, None], units, embeddings)
        finite = embeddings.isfinite().all(-1, keepdim=True)
        self.embeddings = made.masked_fill(~finite, NAN)

    def _sum(self, chunk: PooledChunk, hidden: Tensor) -> Tensor | None:
        """float32[hidden] of a last chunk; of another there is nothing to be had yet."""
        states = hidden[chunk.first : chunk.first + chunk.tokens]
        total = None
        match self._pooling[chunk.row].kind:
            case PoolingKind.LAST:
                total = states[-1].float()
            case PoolingKind.MEAN:
                total = self._means.add(chunk.row, states, is_last=chunk.is_last)
        return total if chunk.is_last else None

    def _states(self, row: int) -> int:
        """How many its sum is of."""
        return self._lengths[row] if self._pooling[row].kind is PoolingKind.MEAN else 1
