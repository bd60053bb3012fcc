"""Pinned host memory that steps are staged in on their way to the device."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class PinnedRing:
    """A few buffers in turn: one may be filled again once the copies out of it have ended, which
    is the caller's to know."""

    def __init__(self, *, buffers: int, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        empty: NDArray[Any] = np.zeros(shape, dtype)
        pinned = torch.cuda.is_available()
        self._buffers = [
            torch.from_numpy(empty.copy()).pin_memory()
            if pinned
            else torch.from_numpy(empty.copy())
            for _ in range(buffers)
        ]
        self._turn = 0

    def next(self) -> Tensor:
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]
