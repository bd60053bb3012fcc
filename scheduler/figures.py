"""The scheduler's state in numbers."""

import msgspec


class Figures(msgspec.Struct, frozen=True):
    """What stands at this moment, then what has added up since the start."""

    requests_running: int
    requests_waiting: int
    replies_kept: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_block_tokens: int
    adapters_resident: int
    adapters_pinned: int
    adapter_pool_used_bytes: int
    adapter_pool_pinned_bytes: int
    adapter_pool_evictions: int
    prefix_cache_hit_tokens: int
    preemptions: int
    steps: int
    tokens_generated: int
