"""Make a worker out of the settings and a model folder: the one place that knows all its parts."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.attention.sdpa import SdpaAttention
from gpu_worker.device import choose_device, choose_dtype, set_threads
from gpu_worker.figures import Figures
from gpu_worker.kernels import LoraKernels
from gpu_worker.kernels.grouped import Grouped
from gpu_worker.kernels.reference import Reference
from gpu_worker.kv_cache import KvCache, block_bytes
from gpu_worker.models.decoder import Decoder
from gpu_worker.rows import RowTable
from gpu_worker.weights import Checkpoint, DummyCheckpoint
from gpu_worker.worker import Worker
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.messages import WorkerReady
from pipeline.model_config import ModelConfig, read_model_config

log = logging.getLogger(__name__)
Facts = dict[str, str | int | float | None]


class Built(NamedTuple):
    """A worker that can work, and what it says of itself."""

    worker: Worker
    ready: WorkerReady
    facts: Facts


def build_worker(settings: Settings, folder: Path, figures: Figures, index: int = 0) -> Built:
    """Load the weights and allocate the rest. Raises ConfigError."""
    config = read_model_config(folder)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, config.dtype)
    set_threads(settings.gpu_threads)
    kv_blocks = _kv_blocks(settings, config, dtype)
    with torch.inference_mode(), _checkpoint(settings, folder, config, dtype, device) as weights:
        decoder = Decoder(config, weights, device)
    kv_cache = KvCache(
        config,
        blocks=kv_blocks,
        block_tokens=settings.kv_block_tokens,
        dtype=dtype,
        device=device,
    )
    worker = Worker(
        decoder=decoder,
        kv_cache=kv_cache,
        adapters=AdapterPool(
            nbytes=settings.adapter_pool_bytes,
            shapes=config.module_shapes(),
            dtype=dtype,
            device=device,
        ),
        rows=RowTable(
            rows=settings.rows,
            row_tokens=min(config.max_positions, kv_blocks * settings.kv_block_tokens),
            block_tokens=settings.kv_block_tokens,
        ),
        attention=SdpaAttention(
            kv_heads=config.kv_heads,
            block_tokens=settings.kv_block_tokens,
            null_block=kv_cache.null_block,
            sliding_window=config.sliding_window,
            dtype=dtype,
            device=device,
        ),
        lora=_lora_kernels(settings.lora_kernels),
        figures=figures,
        device=device,
        index=index,
    )
    ready = _ready(settings, kv_blocks, index)
    log.info(
        "event=weights_loaded family=%s layers=%d dtype=%s device=%s kv_blocks=%d",
        config.family,
        config.layers,
        dtype,
        device,
        kv_blocks,
    )
    return Built(worker, ready, _facts(config, dtype, device, ready))


def _checkpoint(
    settings: Settings,
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Checkpoint:
    if settings.load_format == "dummy":
        return DummyCheckpoint(config, dtype=dtype, device=device)
    return Checkpoint(folder, config, dtype=dtype, device=device)


def _kv_blocks(settings: Settings, config: ModelConfig, dtype: torch.dtype) -> int:
    nbytes = block_bytes(config, block_tokens=settings.kv_block_tokens, dtype=dtype)
    blocks = settings.kv_cache_bytes // nbytes
    if blocks < 1:
        raise ConfigError(
            f"kv_cache_bytes: {settings.kv_cache_bytes} bytes hold no block of "
            f"{settings.kv_block_tokens} tokens, which takes {nbytes}"
        )
    return blocks


def _lora_kernels(setting: str) -> LoraKernels:
    return Reference() if setting == "reference" else Grouped()


def _ready(settings: Settings, kv_blocks: int, index: int) -> WorkerReady:
    return WorkerReady(
        kv_blocks=kv_blocks,
        block_tokens=settings.kv_block_tokens,
        adapter_pool_bytes=settings.adapter_pool_bytes,
        adapter_slots=settings.adapter_slots,
        rows=settings.rows,
        index=index,
    )


def _facts(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, ready: WorkerReady
) -> Facts:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "dtype": str(dtype),
        "family": config.family,
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "kv_blocks": ready.kv_blocks,
        "block_tokens": ready.block_tokens,
        "adapter_pool_bytes": ready.adapter_pool_bytes,
        "adapter_slots": ready.adapter_slots,
        "rows": ready.rows,
    }
