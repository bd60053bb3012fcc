"""Make a worker out of the settings and a model folder: the one place that knows all its parts."""

import importlib.util
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from llguidance import LLTokenizer
from msgspec.structs import replace
from torch import Tensor

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.attention import AttentionBackend
from gpu_worker.attention.sdpa import SdpaAttention
from gpu_worker.cuda_adapter_pool import CudaAdapterPool
from gpu_worker.device import choose_device, choose_dtype, set_threads
from gpu_worker.figures import Figures
from gpu_worker.forward import EagerForward, Forward
from gpu_worker.grammars import Grammars
from gpu_worker.history import History
from gpu_worker.kernels import LoraKernels
from gpu_worker.kernels.grouped import Grouped, stack_bytes
from gpu_worker.kernels.reference import Reference
from gpu_worker.kv_cache import KvCache, block_bytes
from gpu_worker.layers.rotary import Rotary
from gpu_worker.layers.torch_ops import TorchOps
from gpu_worker.memory import activation_bytes, device_memory, divide, step_sizes
from gpu_worker.models.decoder import Decoder
from gpu_worker.rows import RowTable
from gpu_worker.watermark import Watermark
from gpu_worker.weights import Checkpoint, DummyCheckpoint
from gpu_worker.worker import Worker
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.grammars import load_vocabulary
from pipeline.messages import Step, WorkerReady
from pipeline.model_config import ModelConfig, read_model_config

BLOCK_TOKENS = 16
FLASH_BLOCK_TOKENS = 256  # its pages are a multiple of this
log = logging.getLogger(__name__)
Facts = dict[str, str | int | float | None]


class Built(NamedTuple):
    """A worker that can work, and what it says of itself."""

    worker: Worker
    ready: WorkerReady
    facts: Facts
    new_grammars: Callable[[], Grammars]  # that nobody has asked for anything


class Parts(NamedTuple):
    """What the ways through the model share."""

    settings: Settings  # with rows and step_tokens as they are for this device
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    attention: str
    decoder: Decoder
    kv_cache: KvCache
    adapters: AdapterPool | CudaAdapterPool
    history: History
    row_tokens: int


def build_worker(settings: Settings, folder: Path, figures: Figures, index: int = 0) -> Built:
    """Load the weights and allocate the rest. Raises ConfigError."""
    config = read_model_config(folder)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, config.dtype)
    set_threads(settings.gpu_threads)
    attention = _attention(settings, device, dtype)
    vocabulary = _load_vocabulary(folder, config)
    with torch.inference_mode(), _checkpoint(settings, folder, config, dtype, device) as weights:
        decoder = Decoder(config, weights)
    parts = _allocate(settings, config, device, dtype, attention, decoder)
    rows = RowTable(
        rows=parts.settings.rows,
        row_tokens=parts.row_tokens,
        block_tokens=parts.kv_cache.block_tokens,
    )
    forward = _forward(parts)
    new_grammars = partial(_grammars, parts, vocabulary)
    worker = Worker(
        forward=forward,
        adapters=parts.adapters,
        rows=rows,
        history=parts.history,
        figures=figures,
        grammars=new_grammars(),
        device=device,
        index=index,
        watermark=Watermark(
            settings.watermark_gamma, settings.watermark_delta, settings.watermark_key
        ),
    )
    if device.type == "cuda":
        from gpu_worker.build_cuda import make_ready  # Triton is not there on a plain CPU

        make_ready(worker, forward, parts.settings, parts.kv_cache.block_tokens)
    else:
        worker.rehearse(Step(0))  # numpy reads parts of itself from disk when first used
    ready = _ready(parts, index)
    facts = _facts(parts, ready)
    log.info("event=worker_ready %s", " ".join(f"{name}={fact}" for name, fact in facts.items()))
    return Built(worker, ready, facts, new_grammars)


def _attention(settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """Raises ConfigError for a backend that cannot run here."""
    cuda = device.type == "cuda"
    if settings.attention == "auto":
        return "triton" if cuda else "sdpa"
    if settings.attention == "flash" and not (
        cuda
        and dtype in (torch.bfloat16, torch.float16)
        and importlib.util.find_spec("flash_attn") is not None
    ):
        raise ConfigError(
            "attention: flash wants a GPU, bfloat16 or float16, and flash-attn installed"
        )
    if settings.attention == "triton" and not cuda:
        raise ConfigError("attention: triton wants a GPU")
    return settings.attention


def _checkpoint(
    settings: Settings, folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Checkpoint | DummyCheckpoint:
    if settings.load_format == "dummy":
        return DummyCheckpoint(config, dtype=dtype, device=device)
    return Checkpoint(folder, config, dtype=dtype, device=device)


def _allocate(
    settings: Settings,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    decoder: Decoder,
) -> Parts:
    block_tokens = settings.kv_block_tokens or BLOCK_TOKENS
    if attention == "flash":
        block_tokens = settings.kv_block_tokens or FLASH_BLOCK_TOKENS
        if block_tokens % FLASH_BLOCK_TOKENS:
            raise ConfigError(
                f"kv_block_tokens: attention flash wants a multiple of {FLASH_BLOCK_TOKENS}"
            )
    total, free = device_memory(device)
    division = divide(settings, total=total, free=free)
    kv_blocks = _kv_blocks(division.kv_cache, config, dtype, block_tokens)
    sizes = step_sizes(
        settings,
        total=total,
        kv_blocks=kv_blocks,
        token_bytes=activation_bytes(config, dtype),
    )
    row_tokens = min(
        settings.max_total_tokens or config.max_positions,
        config.max_positions,
        kv_blocks * block_tokens,
    )
    return Parts(
        settings=replace(settings, rows=sizes.rows, step_tokens=sizes.tokens),
        config=config,
        device=device,
        dtype=dtype,
        attention=attention,
        decoder=decoder,
        kv_cache=KvCache(
            config, blocks=kv_blocks, block_tokens=block_tokens, dtype=dtype, device=device
        ),
        adapters=_adapter_pool(settings, config, division.adapter_pool, dtype, device),
        history=History(rows=sizes.rows, row_tokens=row_tokens, device=device),
        row_tokens=row_tokens,
    )


def _adapter_pool(
    settings: Settings, config: ModelConfig, nbytes: int, dtype: torch.dtype, device: torch.device
) -> AdapterPool | CudaAdapterPool:
    if device.type == "cuda":
        from gpu_worker.build_cuda import cuda_adapter_pool

        return cuda_adapter_pool(settings, config, nbytes, dtype, device)
    return AdapterPool(nbytes=nbytes, shapes=config.module_shapes(), dtype=dtype, device=device)


def _kv_blocks(nbytes: int, config: ModelConfig, dtype: torch.dtype, block_tokens: int) -> int:
    of_block = block_bytes(config, block_tokens=block_tokens, dtype=dtype)
    blocks = nbytes // of_block
    if blocks < 1:
        raise ConfigError(
            f"kv_cache_bytes: {nbytes} bytes hold no block of {block_tokens} tokens, "
            f"which takes {of_block}"
        )
    return blocks


def _forward(parts: Parts) -> Forward:
    if parts.device.type == "cuda":
        from gpu_worker.build_cuda import cuda_forward  # Triton is not there on a plain CPU

        return cuda_forward(parts)
    rotary = make_rotary(parts)

    def make_ops(positions: Tensor, kv_slots: Tensor) -> TorchOps:
        return TorchOps(
            rotary=rotary,
            kv_cache=parts.kv_cache,
            kv_heads=parts.config.kv_heads,
            norm_eps=parts.config.norm_eps,
            positions=positions,
            kv_slots=kv_slots,
        )

    return EagerForward(
        decoder=parts.decoder,
        kv_cache=parts.kv_cache,
        make_ops=make_ops,
        attention=make_sdpa(parts),
        lora=_lora_kernels(parts),
        adapters=parts.adapters,
        device=parts.device,
    )


def make_rotary(parts: Parts) -> Rotary:
    return Rotary(
        head_dim=parts.config.head_dim,
        theta=parts.config.rope_theta,
        scaling=parts.config.rope_scaling,
        device=parts.device,
    )


def make_sdpa(parts: Parts) -> AttentionBackend:
    return SdpaAttention(
        kv_heads=parts.config.kv_heads,
        block_tokens=parts.kv_cache.block_tokens,
        null_block=parts.kv_cache.null_block,
        sliding_window=parts.config.sliding_window,
        dtype=parts.dtype,
        device=parts.device,
    )


def _load_vocabulary(folder: Path, config: ModelConfig) -> "Future[LLTokenizer]":
    """Beside the weights: it takes a second in which no other Python runs."""
    pool = ThreadPoolExecutor(1)
    vocabulary = pool.submit(
        load_vocabulary, folder, eos_token_ids=config.eos_token_ids, size=config.vocabulary
    )
    pool.shutdown(wait=False)
    return vocabulary


def _grammars(parts: Parts, vocabulary: "Future[LLTokenizer]") -> Grammars:
    """On a GPU there are cores to spare; on a CPU they are busy with the step."""
    cores = len(os.sched_getaffinity(0))
    return Grammars(
        load_vocabulary=vocabulary.result,
        rows=parts.settings.rows,
        vocabulary=parts.config.vocabulary,
        eos_token_ids=parts.config.eos_token_ids,
        threads=max(1, min(8, cores // 2)) if parts.device.type == "cuda" else 1,
    )


def _lora_kernels(parts: Parts) -> LoraKernels:
    if parts.settings.lora_kernels == "reference":
        return Reference()
    return Grouped(stack_bytes=stack_bytes(parts.adapters.nbytes))


def _ready(parts: Parts, index: int) -> WorkerReady:
    return WorkerReady(
        kv_blocks=parts.kv_cache.blocks,
        block_tokens=parts.kv_cache.block_tokens,
        adapter_pool_bytes=parts.adapters.nbytes,
        adapter_slots=parts.settings.adapter_slots,
        rows=parts.settings.rows,
        index=index,
        step_tokens=parts.settings.step_tokens,
    )


def _facts(parts: Parts, ready: WorkerReady) -> Facts:
    cuda = parts.device.type == "cuda"
    return {
        "dtype": str(parts.dtype),
        "family": parts.config.family,
        "layers": parts.config.layers,
        "hidden_size": parts.config.hidden,
        "device": parts.device.type,
        "device_name": torch.cuda.get_device_name(parts.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "attention": parts.attention,
        "kv_blocks": ready.kv_blocks,
        "block_tokens": ready.block_tokens,
        "adapter_pool_bytes": ready.adapter_pool_bytes,
        "adapter_slots": ready.adapter_slots,
        "rows": ready.rows,
        "step_tokens": ready.step_tokens,
    }
