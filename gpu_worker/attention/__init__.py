"""Attention backends: what a step looks like to them, and what they offer to the decoder."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class StepSequences(NamedTuple):
    """The sequences of a step in the order of their tokens: decode rows, then prefill chunks.

    Sequence i feeds query_lengths[i] tokens, which are the last of its lengths[i]; their KV is
    written before attention runs.
    """

    decode_rows: int  # the first so many sequences feed one token each
    query_lengths: NDArray[np.int64]  # [sequences]
    lengths: NDArray[np.int64]  # [sequences]
    page_table: NDArray[np.int64]  # [sequences, blocks]; beyond a sequence's length: undefined


class AttentionPlan(Protocol):
    """What a backend has worked out for one step, for all its layers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, windowed: bool) -> Tensor:
        """Attend to everything up to each token, or to the last `sliding_window` of it.

        q         [tokens, heads, head_dim]
        k, v      [tokens, kv_heads, head_dim], of this step's tokens; in the cache already
        cache     [blocks, 2, kv_heads, block_tokens, head_dim] of this layer, k before v
        windowed  this layer has a sliding window
        returns   [tokens, heads * head_dim], the caller's
        """
        ...


class AttentionBackend(Protocol):
    """reads_unwritten: places of a block that were never written are multiplied with 0, and must
    therefore be finite."""

    reads_unwritten: bool

    def plan(self, sequences: StepSequences) -> AttentionPlan:
        """Called once per step, before its first layer."""
        ...


class PagedBackend(AttentionBackend, Protocol):
    """A backend that works from page tables on the device."""

    def plan_decode(self, page_table: Tensor, lengths: Tensor) -> AttentionPlan:
        """For rows that feed one token each; may be captured in a CUDA graph.

        page_table  int32[rows, blocks]
        lengths     int32[rows], with the token that is fed
        """
        ...
