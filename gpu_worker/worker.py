"""The worker: applies one Step after the other to the device's memory, and gives its tokens.

Knows no socket. Steps may be sent ahead of their predecessors' results: what a decode row feeds is
kept here, in the row table.
"""

import time
from mmap import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.attention import AttentionBackend
from gpu_worker.batch import HostBatch, make_batch
from gpu_worker.figures import Figures
from gpu_worker.kernels import LoraKernels
from gpu_worker.kv_cache import KvCache
from gpu_worker.layers.rotary import Rotary
from gpu_worker.layers.torch_ops import TorchOps
from gpu_worker.models.decoder import Decoder, Pass
from gpu_worker.rows import RowTable
from gpu_worker.sampling import SampledRows, sample
from pipeline.messages import Step, StepDone
from pipeline.model_config import ModelConfig


class Worker:
    """One device: its weights, KV cache, adapter pool and row table."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        decoder: Decoder,
        kv_cache: KvCache,
        adapters: AdapterPool,
        rows: RowTable,
        attention: AttentionBackend,
        lora: LoraKernels,
        figures: Figures,
        device: torch.device,
        index: int = 0,
    ) -> None:
        self._config = config
        self._decoder = decoder
        self._rotary = Rotary(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            device=device,
        )
        self._kv_cache = kv_cache
        self.adapters = adapters
        self.rows = rows
        self._attention = attention
        self._lora = lora
        self._figures = figures
        self._device = device
        self._index = index

    def attach_arena(self, arena: mmap) -> None:
        """Adapters are copied out of this from now on."""
        self.adapters.attach_arena(arena)

    @torch.inference_mode()
    def run(self, step: Step) -> StepDone:
        """Run a step to its end. Raises ValueError for one that contradicts the row table."""
        start = time.perf_counter()
        self._change(step)
        if not step.decode_rows and not step.prefill:
            return StepDone(step.step_id, b"", index=self._index)
        host = make_batch(step, self.rows)
        logits = self.forward(host)
        done = self._sample(step.step_id, host, logits)
        self._count(host, time.perf_counter() - start)
        return done

    @torch.inference_mode()
    def forward(self, host: HostBatch) -> torch.Tensor:
        """Logits [sampled, vocabulary] of a batch; its keys and values are in the cache then."""
        step = Pass(
            token_ids=self._tensor(self.rows.history[host.token_rows, host.positions]).long(),
            sampled=self._tensor(host.sampled),
            ops=TorchOps(
                rotary=self._rotary,
                kv_cache=self._kv_cache,
                kv_heads=self._config.kv_heads,
                norm_eps=self._config.norm_eps,
                positions=self._tensor(host.positions),
                kv_slots=self._tensor(host.kv_slots),
            ),
            attention=self._attention.plan(host.sequences),
            kv_cache=self._kv_cache,
            lora=self._lora.plan(host.segments, self.adapters.adapters) if host.segments else None,
        )
        return self._decoder.forward(step)

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _change(self, step: Step) -> None:
        if step.copies:
            self._figures.copied_bytes.inc(self.adapters.copy(step.copies))
            self._figures.copies.inc(len(step.copies))
        self.rows.free(np.frombuffer(step.free_rows, np.int32))
        fresh = [self.rows.take(new) for new in step.new_rows]
        appended = np.frombuffer(step.blocks, np.int32)
        self.rows.append_blocks(np.frombuffer(step.block_rows, np.int32), appended)
        blocks = np.concatenate((*fresh, appended.astype(np.int64)))
        if len(blocks):
            self._kv_cache.clear(torch.from_numpy(blocks).to(self._device))

    def _sample(self, step_id: int, host: HostBatch, logits: torch.Tensor) -> StepDone:
        table, rows = self.rows, host.sampled_rows
        if not len(rows):
            return StepDone(step_id, b"", index=self._index)
        sampled = SampledRows(
            params=table.sampling[rows],
            rows=rows,
            history=self._tensor(table.history),
            lengths=table.length[rows],
            prompt_tokens=table.prompt_tokens[rows],
            logprobs=table.logprobs[rows],
        )
        chosen, logprobs = sample(logits, sampled)
        tokens = chosen.cpu().numpy()
        table.append_tokens(rows, tokens)
        return StepDone(
            step_id,
            tokens.astype(np.int32).tobytes(),
            b"" if logprobs is None else logprobs.cpu().numpy().tobytes(),
            index=self._index,
        )

    def _count(self, host: HostBatch, seconds: float) -> None:
        decoded = host.sequences.decode_rows
        self._figures.step_seconds.observe(seconds)
        self._figures.decode_tokens.inc(decoded)
        self._figures.prefill_tokens.inc(len(host.token_rows) - decoded)
        self._figures.sampled_tokens.inc(len(host.sampled_rows))
