"""The tokens of all rows, on the device: what is fed is read here, what is sampled is written."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.device import to_device, zeros


class History:
    """Owns int32[rows + 1, row_tokens + 1]: prompt, then output. The last row belongs to nobody:
    what pads a batch may read and write it. The last column is sampled and never fed.

    Nothing here waits for the device.
    """

    def __init__(self, *, rows: int, row_tokens: int, device: torch.device) -> None:
        self.nobody = rows
        self.tokens = zeros((rows + 1, row_tokens + 1), dtype=torch.int32, device=device)

    def write(self, row: int, tokens: NDArray[Any]) -> None:
        """A sequence takes the row: int32[n], its tokens so far."""
        self.tokens[row, : len(tokens)].copy_(to_device(tokens, self.tokens.device))

    def read(self, rows: Tensor, positions: Tensor) -> Tensor:
        """int64[n]: the tokens at int64[n] rows and positions."""
        return self.tokens[rows, positions].long()

    def append(self, rows: Tensor, lengths: Tensor, tokens: Tensor) -> None:
        """Row rows[i] has produced tokens[i] at place lengths[i]; no row occurs twice. -1 is kept
        as token 0: what follows it is dropped, but may be on its way already."""
        self.tokens.index_put_((rows, lengths), tokens.clamp(min=0).int())
