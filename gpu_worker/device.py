"""Where the worker computes: device, dtype, threads, and memory that is there when first used."""

import math
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(setting: str) -> torch.device:
    """Raises ConfigError when CUDA is asked for and not there."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, and torch finds no CUDA device")
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)


def choose_dtype(setting: str, checkpoint: str) -> torch.dtype:
    """`auto` is what the checkpoint says of itself. Raises ConfigError."""
    name = checkpoint if setting == "auto" else setting
    if name not in DTYPES:
        raise ConfigError(f"dtype: the checkpoint's dtype {name} is not supported; set another")
    return DTYPES[name]


def set_threads(setting: int) -> None:
    """0: all cores, and one less where there are more than three. A step is thousands of small
    parallel regions, and each ends when its slowest thread does: a core that the other processes
    want slows all of them down, which on few cores is still better than to leave one idle."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(setting or (cores - 1 if cores > 3 else cores))


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of an array, without waiting for the device: CUDA has read an array that is not
    pinned by the time the call returns. On the CPU the two share their memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. On the CPU, pages of it take memory and time only once they are used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
