"""From a batch to its logits: which way a step goes through the model."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.adapter_pool import AdapterPool
from gpu_worker.attention import AttentionBackend
from gpu_worker.batch import HostBatch
from gpu_worker.cuda_adapter_pool import CudaAdapterPool
from gpu_worker.cuda_graphs import DecodeGraphs
from gpu_worker.device import to_device
from gpu_worker.history import History
from gpu_worker.kernels import LoraKernels
from gpu_worker.kv_cache import KvCache
from gpu_worker.layers import BaseLinears, LayerOps
from gpu_worker.layers.linear import Linear
from gpu_worker.models.decoder import Decoder, Pass
from gpu_worker.rows import RowTable


class Reader(Protocol):
    """Who makes something of the hidden states of a step besides logits."""

    def take(self, hidden: Tensor, lm_head: Linear) -> None:
        """[tokens, hidden] after the final norm, and what makes logits of it."""
        ...


class Forward(Protocol):
    """Owns what a pass reads and writes beside the history."""

    def run(
        self,
        host: HostBatch,
        history: History,
        started: Callable[[], None],
        readers: Sequence[Reader] = (),
    ) -> Tensor:
        """Logits [sampled, vocabulary] of a batch; its keys and values are in the cache then. They
        stand until the next run. `started` is called before the model is launched, behind what
        can be done for the step without the device. `readers` take what they want to know."""
        ...

    def pages_changed(
        self, rows: RowTable, changed: NDArray[np.int64], blocks: NDArray[np.int64]
    ) -> None:
        """These rows have other blocks; and of these blocks nothing is known yet."""
        ...


class EagerForward:
    """Any step, operation by operation, with ops and attention that are chosen for the device.

    make_ops  of int64[tokens] positions and KV slots
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        kv_cache: KvCache,
        make_ops: Callable[[Tensor, Tensor], LayerOps],
        attention: AttentionBackend,
        lora: LoraKernels,
        adapters: AdapterPool | CudaAdapterPool,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._make_ops = make_ops
        self._attention = attention
        self._lora = lora
        self._adapters = adapters
        self._device = device

    def run(
        self,
        host: HostBatch,
        history: History,
        started: Callable[[], None],
        readers: Sequence[Reader] = (),
    ) -> Tensor:
        started()
        positions = self._tensor(host.positions)
        segments = host.segments
        arrivals = self._adapters.arrivals(segments)
        if arrivals is not None:
            arrivals.enter(0)  # the plan reads the adapters' tables, which come first
        step = Pass(
            token_ids=history.read(self._tensor(host.token_rows), positions),
            sampled=self._tensor(host.sampled),
            ops=self._make_ops(positions, self._tensor(host.kv_slots)),
            attention=self._attention.plan(host.sequences),
            kv_cache=self._kv_cache,
            linears=self._lora.plan(segments, self._adapters.adapters)
            if segments
            else BaseLinears(),
            enter=None if arrivals is None else arrivals.enter,
            read=[reader.take for reader in readers],
        )
        return self._decoder.forward(step)

    def pages_changed(
        self, rows: RowTable, changed: NDArray[np.int64], blocks: NDArray[np.int64]
    ) -> None:
        if self._attention.reads_unwritten and len(blocks):
            self._kv_cache.clear(self._tensor(blocks))

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return to_device(array, self._device)


class GraphedForward:
    """Decode steps as CUDA graphs, all others eagerly.

    A graph cannot wait on its way, so such a step waits for whole adapters: rarely, since a row
    is decoded after its prefill.
    """

    def __init__(
        self,
        *,
        eager: EagerForward,
        graphs: DecodeGraphs,
        adapters: AdapterPool | CudaAdapterPool,
        device: torch.device,
    ) -> None:
        self._eager = eager
        self.graphs = graphs
        self._adapters = adapters
        self._device = device

    def run(
        self,
        host: HostBatch,
        history: History,
        started: Callable[[], None],
        readers: Sequence[Reader] = (),
    ) -> Tensor:
        if not self.graphs.holds(host):  # nor any that has a prompt to read
            return self._eager.run(host, history, started, readers)
        arrivals = self._adapters.arrivals(host.segments)
        if arrivals is not None:
            arrivals.enter_all()
        logits = self.graphs.run(host, started)
        if (host.sampled[1:] > host.sampled[:-1]).all():
            return logits
        return logits.index_select(0, to_device(host.sampled, self._device))

    def pages_changed(
        self, rows: RowTable, changed: NDArray[np.int64], blocks: NDArray[np.int64]
    ) -> None:
        self._eager.pages_changed(rows, changed, blocks)
        self.graphs.pages_changed(rows, changed)
