"""The ways through the model on a GPU: Triton between the linear layers, graphs for decode."""

import logging
import time

import torch
from torch import Tensor

from gpu_worker.attention import AttentionBackend, PagedBackend
from gpu_worker.attention.triton_paged import TritonPagedAttention
from gpu_worker.build import Parts, make_rotary, make_sdpa
from gpu_worker.cuda_adapter_pool import CudaAdapterPool
from gpu_worker.cuda_graphs import DecodeGraphs, StaticBatch
from gpu_worker.forward import EagerForward, Forward, GraphedForward
from gpu_worker.kernels import LoraPlan
from gpu_worker.kernels.adapter_tables import AdapterTables
from gpu_worker.kernels.triton_lora import DECODE, PREFILL, TritonLora
from gpu_worker.kernels.triton_plan import OverlappedPlan, TritonKernels
from gpu_worker.layers import LayerOps
from gpu_worker.layers.triton_ops import TritonOps
from gpu_worker.models.decoder import Pass
from pipeline.config import Settings
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

    def make_ops(positions: Tensor, kv_slots: Tensor) -> LayerOps:
        return TritonOps(
            cos_sin=cos_sin,
            kv_cache=parts.kv_cache,
            kv_heads=config.kv_heads,
            norm_eps=config.norm_eps,
            positions=positions,
            kv_slots=kv_slots,
        )

    tables = parts.adapters.tables
    shapes = config.module_shapes()
    eager_lora = TritonLora(
        tables=tables,
        shapes=shapes,
        layers=config.layers,
        tokens=parts.settings.step_tokens,
        sequences=parts.settings.rows,
        tuning=PREFILL,
    )
    paged = _paged(parts)
    attention: AttentionBackend = paged or make_sdpa(parts)
    eager = EagerForward(
        decoder=parts.decoder,
        kv_cache=parts.kv_cache,
        make_ops=make_ops,
        attention=attention,
        lora=TritonKernels(eager_lora, parts.device),
        adapters=parts.adapters,
        device=parts.device,
    )
    if paged is None or not parts.settings.cuda_graphs:
        return eager

    decode_lora = TritonLora(
        tables=tables,
        shapes=shapes,
        layers=config.layers,
        tokens=parts.settings.rows,
        sequences=parts.settings.rows,
        tuning=DECODE,
    )
    side = torch.cuda.Stream(parts.device)  # type: ignore[no-untyped-call]

    def plan_lora(batch: StaticBatch) -> LoraPlan:
        return OverlappedPlan(decode_lora, decode_lora.prepare(batch.tiles, batch.tile_count), side)

    def decode(batch: StaticBatch, lora: bool) -> Tensor:
        pages = batch.page_table.index_select(0, batch.rows)
        step = Pass(
            token_ids=parts.history.read(batch.rows, batch.positions),
            sampled=None,
            ops=make_ops(batch.positions, batch.kv_slots),
            attention=paged.plan_decode(pages, (batch.positions + 1).int()),
            kv_cache=parts.kv_cache,
            lora=plan_lora(batch) if lora else None,
        )
        return parts.decoder.forward(step)

    graphs = DecodeGraphs(
        forward=decode,
        history=parts.history,
        null_block=parts.kv_cache.null_block,
        block_tokens=parts.kv_cache.block_tokens,
        rows=parts.settings.rows,
        row_blocks=-(-parts.row_tokens // parts.kv_cache.block_tokens),
        tile_height=DECODE.tile_height,
        device=parts.device,
    )
    started = time.perf_counter()
    with torch.inference_mode():
        graphs.capture([False, True])
    log.info("event=graphs_captured seconds=%.1f", time.perf_counter() - started)
    return GraphedForward(eager=eager, graphs=graphs, adapters=parts.adapters, device=parts.device)


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
        )
    return None
