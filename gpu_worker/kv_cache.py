"""The KV cache: blocks of tokens, for all layers, in one tensor."""

import torch
from torch import Tensor

from gpu_worker.device import zeros
from pipeline.model_config import ModelConfig


def block_bytes(config: ModelConfig, *, block_tokens: int, dtype: torch.dtype) -> int:
    """What one block takes, over all layers."""
    per_token = 2 * config.kv_heads * config.head_dim * dtype.itemsize
    return config.layers * block_tokens * per_token


class KvCache:
    """Owns the keys and values of all sequences.

    blocks      that sequences may use, numbered from 0
    null_block  one more, which stays all zeros
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.null_block = blocks
        self._cache = zeros(
            (config.layers, blocks + 1, 2, config.kv_heads, block_tokens, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self._layers = list(self._cache.unbind(0))
        self._places = [layer.flatten(0, 3) for layer in self._layers]

    def layer(self, layer: int) -> Tensor:
        """[blocks + 1, 2, kv_heads, block_tokens, head_dim], keys before values."""
        return self._layers[layer]

    def places(self, slots: Tensor) -> Tensor:
        """Where the heads of tokens go, once per step for all layers.

        slots    int64[tokens], block * block_tokens + place in the block
        returns  int64[tokens * 2 * kv_heads], for `write`
        """
        heads = torch.arange(2 * self._cache.shape[3], device=slots.device)
        blocks = slots.div(self.block_tokens, rounding_mode="floor")[:, None]
        first = (blocks * len(heads) + heads) * self.block_tokens
        return (first + slots[:, None] % self.block_tokens).flatten()

    def write(self, layer: int, places: Tensor, kv: Tensor) -> None:
        """Store keys and values of a step's tokens, [tokens, 2 * kv_heads, head_dim]."""
        self._places[layer].index_copy_(0, places, kv.flatten(0, 1))

    def clear(self, blocks: Tensor) -> None:
        """Zero blocks that change hands: a NaN that their last owner left would spread through
        masked places, as 0 * NaN. blocks is int64[n]."""
        self._cache.index_fill_(1, blocks, 0)
