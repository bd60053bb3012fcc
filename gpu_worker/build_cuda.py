"""The ways through the model on a GPU: Triton between the linear layers, graphs for decode."""

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker import rehearsal
from gpu_worker.attention import AttentionBackend, PagedBackend
from gpu_worker.attention.triton_paged import TritonPagedAttention
from gpu_worker.build import Parts, make_rotary, make_sdpa
from gpu_worker.cuda_adapter_pool import CudaAdapterPool
from gpu_worker.cuda_graphs import DecodeGraphs, StaticBatch
from gpu_worker.forward import EagerForward, Forward, GraphedForward
from gpu_worker.kernels.adapter_tables import AdapterTables
from gpu_worker.kernels.compiling import compiling_ahead
from gpu_worker.kernels.decode_linears import MOST_ROWS, DecodeLinears
from gpu_worker.kernels.triton_columns import TILE_ROWS
from gpu_worker.kernels.triton_lora import TritonLora
from gpu_worker.kernels.triton_plan import TritonKernels, TritonPlan
from gpu_worker.layers import BaseLinears, LayerOps, Linears
from gpu_worker.layers.triton_ops import TritonOps
from gpu_worker.models.decoder import Pass
from gpu_worker.worker import Worker
from pipeline.config import Settings
from pipeline.messages import Step
from pipeline.model_config import ModelConfig

log = logging.getLogger(__name__)


def cuda_adapter_pool(
    settings: Settings, config: ModelConfig, nbytes: int, dtype: torch.dtype, device: torch.device
) -> CudaAdapterPool:
    tables = AdapterTables(
        shapes=config.module_shapes(),
        layers=config.layers,
        slots=settings.adapter_slots,
        dtype=dtype,
        device=device,
    )
    return CudaAdapterPool(nbytes=nbytes, tables=tables, device=device)


def cuda_forward(parts: Parts) -> Forward:
    config = parts.config
    assert isinstance(parts.adapters, CudaAdapterPool)
    cos_sin = make_rotary(parts).table(parts.row_tokens)

    pdl = _has_dependent_launch(parts.device)

    def make_ops(positions: Tensor, kv_slots: Tensor) -> LayerOps:
        return TritonOps(
            pdl=pdl,
            cos_sin=cos_sin,
            kv_cache=parts.kv_cache,
            kv_heads=config.kv_heads,
            norm_eps=config.norm_eps,
            positions=positions,
            kv_slots=kv_slots,
        )

    tables = parts.adapters.tables
    shapes = config.module_shapes()
    lora = TritonLora(
        tables=tables,
        shapes=shapes,
        tokens=parts.settings.step_tokens,
        sequences=parts.settings.rows,
    )
    paged = _paged(parts)
    attention: AttentionBackend = paged or make_sdpa(parts)
    eager = EagerForward(
        decoder=parts.decoder,
        kv_cache=parts.kv_cache,
        make_ops=make_ops,
        attention=attention,
        lora=TritonKernels(lora, parts.device),
        adapters=parts.adapters,
        device=parts.device,
    )
    if paged is None or not parts.settings.cuda_graphs:
        return eager

    fused = _decode_linears(parts) if DecodeLinears.can_run(shapes, parts.dtype) else None

    def linears(batch: StaticBatch, with_lora: bool) -> Linears:
        if fused is not None and with_lora:
            return fused.plan(batch.tiles, batch.tile_count)
        if fused is not None and len(batch.rows) <= MOST_ROWS:
            return fused.base()  # beyond, it reads x and the weight twice, and cuBLAS is faster
        if with_lora:
            return TritonPlan(lora, lora.prepare(batch.tiles, batch.tile_count))
        return BaseLinears()

    def decode(batch: StaticBatch, with_lora: bool) -> Tensor:
        pages = batch.page_table.index_select(0, batch.rows)
        step = Pass(
            token_ids=parts.history.read(batch.rows, batch.positions),
            sampled=None,
            ops=make_ops(batch.positions, batch.kv_slots),
            attention=paged.plan_decode(pages, (batch.positions + 1).int()),
            kv_cache=parts.kv_cache,
            linears=linears(batch, with_lora),
        )
        return parts.decoder.forward(step)

    graphs = DecodeGraphs(
        forward=decode,
        history=parts.history,
        null_block=parts.kv_cache.null_block,
        block_tokens=parts.kv_cache.block_tokens,
        rows=parts.settings.rows,
        row_blocks=-(-parts.row_tokens // parts.kv_cache.block_tokens),
        tile_height=lora.tuning.tile_height if fused is None else TILE_ROWS,
        fits=None if fused is None else fused.holds,
        device=parts.device,
    )
    return GraphedForward(eager=eager, graphs=graphs, adapters=parts.adapters, device=parts.device)


def make_ready(worker: Worker, forward: Forward, settings: Settings, block_tokens: int) -> None:
    """Compile the kernels, use them once, and capture the graphs."""
    started = time.perf_counter()
    tokens = min(settings.step_tokens, worker.rows.row_tokens)
    steps = list(rehearsal.steps(tokens=tokens, block_tokens=block_tokens, rows=settings.rows))
    graphs = forward.graphs if isinstance(forward, GraphedForward) else None
    with compiling_ahead():
        _rehearse(worker, steps, graphs)
    _rehearse(worker, steps, graphs)
    if graphs is not None:
        graphs.capture()
    log.info("event=kernels_ready seconds=%.1f", time.perf_counter() - started)


def _rehearse(worker: Worker, steps: Sequence[Step], graphs: DecodeGraphs | None) -> None:
    for step in steps:
        worker.rehearse(step)
    if graphs is not None:
        graphs.rehearse()
    torch.cuda.synchronize()


def _paged(parts: Parts) -> PagedBackend | None:
    config = parts.config
    if parts.attention == "flash":
        from gpu_worker.attention.flash import FlashAttention  # flash-attn need not be installed

        return FlashAttention(sliding_window=config.sliding_window, device=parts.device)
    if parts.attention == "triton":
        return TritonPagedAttention(
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
            dtype=parts.dtype,
            device=parts.device,
            pdl=_has_dependent_launch(parts.device),
        )
    return None


def _decode_linears(parts: Parts) -> DecodeLinears:
    assert isinstance(parts.adapters, CudaAdapterPool)
    return DecodeLinears(
        tables=parts.adapters.tables,
        shapes=parts.config.module_shapes(),
        layers=parts.config.layers,
        rows=parts.settings.rows,
        pdl=_has_dependent_launch(parts.device),
        processors=torch.cuda.get_device_properties(parts.device).multi_processor_count,
    )


def _has_dependent_launch(device: torch.device) -> bool:
    """From Hopper on, a kernel may start before the one that it depends on has ended."""
    return torch.cuda.get_device_capability(device)[0] >= 9
