"""The KV cache."""

from pathlib import Path

import pytest
import torch

from gpu_worker.kv_cache import KvCache, block_bytes
from pipeline.model_config import ModelConfig, read_model_config

CPU = torch.device("cpu")


@pytest.fixture
def config(llama_folder: Path) -> ModelConfig:
    return read_model_config(llama_folder)


def make_cache(config: ModelConfig, blocks: int = 5) -> KvCache:
    return KvCache(config, blocks=blocks, block_tokens=4, dtype=torch.float32, device=CPU)


def test_a_token_is_written_where_its_slot_says(config: ModelConfig) -> None:
    cache = make_cache(config)
    kv = torch.randn(3, 2 * config.kv_heads, config.head_dim)
    cache.write(1, cache.places(torch.tensor([6, 0, 19])), kv)
    for token, (block, place) in enumerate([(1, 2), (0, 0), (4, 3)]):
        written = cache.layer(1)[block, :, :, place]
        assert torch.equal(written.flatten(0, 1), kv[token])
    assert cache.layer(1).count_nonzero() == kv.numel()
    assert not cache.layer(0).any()


def test_clearing_empties_all_layers_of_the_blocks_and_no_other(config: ModelConfig) -> None:
    cache = make_cache(config)
    slots = torch.arange(5 * 4)
    for layer in range(config.layers):
        cache.write(layer, cache.places(slots), torch.full((20, 4, config.head_dim), torch.nan))
    cache.clear(torch.tensor([3, 1]))
    for layer in range(config.layers):
        empty = [bool((block == 0).all()) for block in cache.layer(layer)]
        assert empty == [False, True, False, True, False, True]  # the last is the null block


def test_a_block_takes_what_block_bytes_says(config: ModelConfig) -> None:
    layer = make_cache(config).layer(0)
    nbytes = layer[0].numel() * layer.element_size() * config.layers
    assert nbytes == block_bytes(config, block_tokens=4, dtype=torch.float32)
