"""What rows have added to the logits of single tokens: `logit_bias`, and ends that come too early.

Kept on the host, since few rows have any; rows that have none cost nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.device import to_device
from pipeline.messages import NewRow

NEVER = float("-inf")


class StepBiases(NamedTuple):
    """Those of the rows of a step, in any order; a place may occur more than once."""

    at: NDArray[np.int64]  # [n], the row's place among those that are sampled
    token_ids: NDArray[np.int64]  # [n]
    values: NDArray[np.float32]  # [n]


class _RowBiases(NamedTuple):
    token_ids: NDArray[np.int64]
    values: NDArray[np.float32]
    end_token_ids: NDArray[np.int64]  # forbidden for a while
    allowed_from: int  # the length of the row from which on they are not


class Biases:
    """By row of the table."""

    def __init__(self) -> None:
        self._of: dict[int, _RowBiases] = {}

    def take(self, new: NewRow) -> None:
        """A sequence takes the row."""
        sampling = new.sampling
        self._of.pop(new.row, None)
        if not (sampling.logit_bias or (sampling.min_tokens and new.end_token_ids)):
            return
        self._of[new.row] = _RowBiases(
            np.array([token_id for token_id, _ in sampling.logit_bias], np.int64),
            np.array([value for _, value in sampling.logit_bias], np.float32),
            np.array(new.end_token_ids, np.int64),
            new.prompt_tokens + sampling.min_tokens,
        )

    def free(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._of.pop(row, None)

    def of_step(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> StepBiases | None:
        """Of the rows that are sampled, at these lengths; None if no row has any."""
        if not self._of:
            return None
        parts = [
            part
            for at, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True))
            if (biases := self._of.get(row)) is not None
            for part in _parts(at, biases, length)
        ]
        return StepBiases(*map(np.concatenate, zip(*parts, strict=True))) if parts else None


def biased(logits: Tensor, biases: StepBiases) -> Tensor:
    """The logits with what is added to them, fp32; those that were given are not changed."""
    device = logits.device
    places = (to_device(biases.at, device), to_device(biases.token_ids, device))
    return logits.to(torch.float32, copy=True).index_put_(
        places, to_device(biases.values, device), accumulate=True
    )


def _parts(at: int, biases: _RowBiases, length: int) -> list[StepBiases]:
    parts = []
    if len(biases.token_ids):
        parts.append(StepBiases(_full(at, biases.token_ids), biases.token_ids, biases.values))
    if length < biases.allowed_from and len(biases.end_token_ids):
        ends = biases.end_token_ids
        parts.append(StepBiases(_full(at, ends), ends, np.full(len(ends), NEVER, np.float32)))
    return parts


def _full(at: int, like: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.full(len(like), at, np.int64)
