"""How device memory is divided between the KV cache and the adapter pool, and how large steps
may be."""

from typing import NamedTuple

import torch

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.model_config import ModelConfig

CPU_KV_CACHE_BYTES = 1 << 30
CPU_ADAPTER_POOL_BYTES = 512 << 20
CPU_ROWS, CPU_STEP_TOKENS = 64, 512
GPU_ROWS, GPU_STEP_TOKENS = 256, 4096
ACTIVATIONS = 0.5  # of what gpu_memory_fraction leaves, at most


class Division(NamedTuple):
    """Bytes of each."""

    kv_cache: int
    adapter_pool: int


def divide(settings: Settings, *, total: int | None, free: int) -> Division:
    """What is not set is a share of what is free once the weights are loaded.

    total  bytes of the device; None for the CPU, whose memory is not ours to fill
    free   bytes that nobody uses yet
    Raises ConfigError when there is too little.
    """
    pool, cache = settings.adapter_pool_bytes, settings.kv_cache_bytes
    if total is None:
        return Division(cache or CPU_KV_CACHE_BYTES, pool or CPU_ADAPTER_POOL_BYTES)
    ours = free - round(total * (1 - settings.gpu_memory_fraction))
    pool = pool or int(max(ours - cache, 0) * settings.adapter_pool_fraction)
    cache = cache or ours - pool
    if cache <= 0 or pool <= 0 or cache + pool > ours:
        raise ConfigError(
            f"gpu_memory_fraction: {max(ours, 0)} bytes of the device are left, but KV cache and "
            f"adapter pool want {max(cache, 0) + pool}"
        )
    return Division(cache, pool)


class StepSizes(NamedTuple):
    rows: int
    tokens: int


def step_sizes(
    settings: Settings, *, total: int | None, kv_blocks: int, token_bytes: int
) -> StepSizes:
    """What is not set of rows and step_tokens depends on the device.

    total        bytes of the device; None for the CPU
    kv_blocks    there is no use for more rows on a GPU
    token_bytes  of activations, for each token of a step
    """
    if total is None:
        most_rows, most_tokens = CPU_ROWS, CPU_STEP_TOKENS
    else:
        spare = total * (1 - settings.gpu_memory_fraction) * ACTIVATIONS
        most_rows = min(GPU_ROWS, kv_blocks)
        most_tokens = max(min(GPU_STEP_TOKENS, int(spare / token_bytes)), CPU_STEP_TOKENS)
    rows = settings.rows or min(most_rows, settings.step_tokens or most_rows)
    return StepSizes(rows, settings.step_tokens or max(most_tokens, rows))


def activation_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one token while a layer runs: the residual, and inputs and outputs of its parts."""
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    return (4 * config.hidden + attention + 3 * config.intermediate) * dtype.itemsize


def device_memory(device: torch.device) -> tuple[int | None, int]:
    """total and free, as `divide` wants them."""
    if device.type != "cuda":
        return None, 0
    free, total = torch.cuda.mem_get_info(device)
    return total, free
