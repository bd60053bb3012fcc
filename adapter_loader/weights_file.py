"""Reading tensors out of an open safetensors file."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_loader.refusals import unavailable
from adapter_loader.safetensors_header import TensorEntry
from adapter_loader.sources import WEIGHTS_FILE

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_exactly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill the buffers, one after another, with what lies in the file from `offset` on.

    They are at most IOV_MAX (1024) buffers of bytes, and may be consumed. Raises RequestError
    when the file has become shorter.
    """
    left = [buffer for buffer in buffers if buffer]
    while left:
        count = os.preadv(descriptor, left, offset)
        if count == 0:
            raise unavailable(f"{WEIGHTS_FILE} changed while it was read")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def tensor_in(buffer: memoryview | bytearray, entry: TensorEntry) -> Tensor:
    """The tensor whose bytes lie at the buffer's start; it lies there, too."""
    flat = torch.frombuffer(buffer, dtype=FILE_DTYPES[entry.dtype], count=math.prod(entry.shape))
    return flat.view(entry.shape)


def read_tensor(descriptor: int, entry: TensorEntry) -> Tensor:
    """The tensor as it is in the file, in memory of its own. Raises RequestError."""
    buffer = bytearray(entry.nbytes)
    read_exactly(descriptor, [memoryview(buffer)], entry.offset)
    return tensor_in(buffer, entry)
