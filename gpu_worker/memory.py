"""How device memory is divided between the KV cache and the adapter pool."""

from typing import NamedTuple

import torch

from pipeline.config import Settings
from pipeline.errors import ConfigError

CPU_KV_CACHE_BYTES = 1 << 30
CPU_ADAPTER_POOL_BYTES = 512 << 20


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


def device_memory(device: torch.device) -> tuple[int | None, int]:
    """total and free, as `divide` wants them."""
    if device.type != "cuda":
        return None, 0
    free, total = torch.cuda.mem_get_info(device)
    return total, free
