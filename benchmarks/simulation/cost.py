"""What things take on one H200 that serves Llama-3.1-8B in bf16, in seconds.

From docs/performance.md: decode steps of 128 rows take 5.97 ms without adapters and more with each
distinct one of rank 16; a prefill of 4,096 tokens takes 90 ms. It knows nothing of the scheduler's
own scheduler/step_cost.py.
"""

from bisect import bisect_left

ADAPTER_BYTES = 84_000_000  # rank 16 on all seven linear layers
ADAPTER_SECONDS = (  # (distinct adapters of a step, what they add to it)
    (0, 0.0),
    (1, 0.73e-3),
    (8, 0.93e-3),
    (32, 1.63e-3),
    (64, 2.33e-3),
    (128, 3.93e-3),
    (256, 7.9e-3),  # 31 us for each beyond
)
WEIGHTS_SECONDS = 4.13e-3  # a step reads them once
ROW_SECONDS = 8e-6
KV_TOKEN_SECONDS = 131072 / 4e12
PROMPT_TOKEN_SECONDS = 22e-6
COPY_BYTES_PER_SECOND = 55e9  # from the host arena
MOVE_BYTES_PER_SECOND = 2e12  # within the pool
PACK_BYTES_PER_SECOND = 1e9  # from the disk cache into the arena, one thread
OPEN_SECONDS = 1e-3  # and check an adapter in the disk cache
SAME_SECONDS = 0.2e-3  # see that one in the arena is still what the disk cache has


def step_seconds(*, rows: int, kv_tokens: int, adapters: int, prompt_tokens: int) -> float:
    """Of one step.

    rows           that decode
    kv_tokens      that these attend to
    adapters       that are distinct
    prompt_tokens  in chunks
    """
    prompt = PROMPT_TOKEN_SECONDS * prompt_tokens
    if not rows:
        return max(WEIGHTS_SECONDS, prompt) + _adapter_seconds(adapters)
    decode = WEIGHTS_SECONDS + ROW_SECONDS * rows + KV_TOKEN_SECONDS * kv_tokens
    return decode + prompt + _adapter_seconds(adapters)


def _adapter_seconds(adapters: int) -> float:
    """Between the measured ones in a straight line."""
    at = max(bisect_left(ADAPTER_SECONDS, adapters, key=lambda entry: entry[0]), 1)
    at = min(at, len(ADAPTER_SECONDS) - 1)
    (low, low_seconds), (high, high_seconds) = ADAPTER_SECONDS[at - 1 : at + 1]
    return low_seconds + (high_seconds - low_seconds) * (adapters - low) / (high - low)
