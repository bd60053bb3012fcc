"""The least time that an H200 needs for a load of Llama-3.1-8B in bfloat16: pure arithmetic.

Measured on the machine itself: the linear layers and the LM head alone in one CUDA graph, the rate
at which device memory is copied, and the rate of large matrix products. Everything is taken as if
nothing else had to be done and nothing overlapped.
"""

from bisect import bisect_left

from pipeline.model_config import ModelConfig

LINEAR_SECONDS = (  # (rows, one step of all linear layers and the LM head)
    (1, 4.05e-3),
    (32, 4.33e-3),
    (64, 4.57e-3),
    (128, 4.80e-3),
    (256, 6.17e-3),
    (512, 10.9e-3),
)
BYTES_PER_SECOND = 4.28e12
FLOPS = 780e12
ELEMENT_BYTES = 2


def linear_seconds(rows: int) -> float:
    """Of one step with so many rows, between the measured ones in a straight line."""
    index = bisect_left(LINEAR_SECONDS, rows, key=lambda entry: entry[0])
    if index == len(LINEAR_SECONDS):
        last_rows, seconds = LINEAR_SECONDS[-1]
        return seconds * rows / last_rows
    if index == 0 or LINEAR_SECONDS[index][0] == rows:
        return LINEAR_SECONDS[index][1]
    (low, low_seconds), (high, high_seconds) = LINEAR_SECONDS[index - 1 : index + 1]
    return low_seconds + (high_seconds - low_seconds) * (rows - low) / (high - low)


def decode_step_seconds(
    config: ModelConfig, *, rows: int, context: float, adapter_bytes: int
) -> float:
    """Linear layers, then the KV of all rows and each distinct adapter, read once.

    context        tokens that a row looks back on, on average
    adapter_bytes  of all distinct adapters of the step together
    """
    kv_token_bytes = 2 * config.layers * config.kv_heads * config.head_dim * ELEMENT_BYTES
    read = rows * context * kv_token_bytes + adapter_bytes
    return linear_seconds(rows) + read / BYTES_PER_SECOND


def prefill_seconds(config: ModelConfig, *, requests: int, tokens: int) -> float:
    """Of all prompts: linear layers and causal attention; the LM head for one token of each.

    The adapters' part, 0.6% of the linear layers at rank 16, is left out. No prefill is shorter
    than a step of one row, which reads the weights once.
    """
    shapes = config.module_shapes()
    linear = config.layers * sum(shape.out_features * shape.in_features for shape in shapes)
    attention = config.layers * config.heads * config.head_dim * tokens  # q k and p v, half of each
    head = config.vocabulary * config.hidden
    flops = 2 * requests * (tokens * (linear + attention) + head)
    return max(flops / FLOPS, linear_seconds(1))


def load_seconds(
    config: ModelConfig, *, requests: int, tokens_in: int, tokens_out: int, adapter_bytes: int
) -> float:
    """All requests at once: every prompt, then the decode steps with every row in them.

    The first token of each comes of its prefill.
    """
    context = tokens_in + tokens_out / 2  # from tokens_in + 1 to tokens_in + tokens_out - 1
    step = decode_step_seconds(config, rows=requests, context=context, adapter_bytes=adapter_bytes)
    return prefill_seconds(config, requests=requests, tokens=tokens_in) + (tokens_out - 1) * step
