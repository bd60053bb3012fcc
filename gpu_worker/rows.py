"""The row table: what the worker knows of each running sequence, in numpy.

Its tokens are not here but in the history, on the device: the host runs ahead of them.
"""

import numpy as np
from numpy.typing import NDArray

from gpu_worker.biases import Biases
from pipeline.messages import Logprobs, NewRow, Pooling

SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int64),
        ("min_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("seed", np.uint64),
        ("watermark", np.bool_),
    ]
)  # messages.Sampling, field by field, but for what Biases hold


NO_LOGPROBS = -1


class RowTable:
    """Owns the rows; a step names them by number.

    rows        how many there are
    row_tokens  tokens that one row may hold, prompt and output together
    """

    def __init__(self, *, rows: int, row_tokens: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self.row_tokens = row_tokens
        self.slot = np.full(rows, -1, np.int64)  # of its adapter; -1 is the base model
        self.length = np.zeros(rows, np.int64)  # tokens that are known; 0: the row is free
        self.prompt_tokens = np.zeros(rows, np.int64)
        self.blocks = np.zeros(rows, np.int64)  # entries of its page table
        self.page_table = np.zeros((rows, -(-row_tokens // block_tokens)), np.int64)
        self.sampling = np.zeros(rows, SAMPLING)
        self.biases = Biases()
        self.top = np.full(rows, NO_LOGPROBS, np.int64)  # of produced tokens
        self.prompt_top = np.full(rows, NO_LOGPROBS, np.int64)
        self.embedded = np.zeros(rows, np.bool_)  # nothing is sampled
        self.pooling: dict[int, Pooling] = {}  # of these

    def free(self, rows: NDArray[np.int32]) -> None:
        self.length[rows] = 0
        self.blocks[rows] = 0
        self.biases.free(rows.tolist())
        if self.pooling:
            self._embed_no_more(rows.tolist())

    def take(self, new: NewRow) -> NDArray[np.int64]:
        """Give a row to a sequence. Returns its blocks that hold nothing of it yet."""
        row = new.row
        tokens = len(new.token_ids) // 4
        blocks = np.frombuffer(new.blocks, np.int32).astype(np.int64)
        self.slot[row] = new.slot
        self.length[row] = tokens
        self.prompt_tokens[row] = new.prompt_tokens
        self.blocks[row] = len(blocks)
        self.page_table[row, : len(blocks)] = blocks
        self.sampling[row] = tuple(getattr(new.sampling, name) for name in SAMPLING.names or ())
        self.biases.take(new)
        self.top[row], self.prompt_top[row] = _tops(new.logprobs)
        if new.pooling is not None:
            self.embedded[row] = True
            self.pooling[row] = new.pooling
        return blocks[-(-new.cached_tokens // self._block_tokens) :]

    def _embed_no_more(self, rows: list[int]) -> None:
        for row in rows:
            if self.pooling.pop(row, None) is not None:
                self.embedded[row] = False

    def append_blocks(self, rows: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        """Row rows[i] gets blocks[i] as its next; a row may occur more than once."""
        for row, block in zip(rows.tolist(), blocks.tolist(), strict=True):
            self.page_table[row, self.blocks[row]] = block
            self.blocks[row] += 1

    def advance(self, rows: NDArray[np.int64]) -> None:
        """These rows have one token more."""
        self.length[rows] += 1

    def kv_slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the keys and values of these tokens lie. Raises ValueError if a row has no block
        for one of them: writing there would spoil somebody else's."""
        blocks = positions // self._block_tokens
        if (blocks >= self.blocks[rows]).any():
            raise ValueError("a step feeds a token that its row has no block for")
        return self.page_table[rows, blocks] * self._block_tokens + positions % self._block_tokens


def _tops(wanted: Logprobs | None) -> tuple[int, int]:
    if wanted is None:
        return NO_LOGPROBS, NO_LOGPROBS
    return wanted.top, NO_LOGPROBS if wanted.prompt_top is None else wanted.prompt_top
