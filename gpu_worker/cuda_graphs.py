"""Decode steps as CUDA graphs, one for each of a few batch sizes, for any rows and any adapters.

A graph reads its batch from static tensors, and what belongs to a row from tables on the device,
which change between replays: history, page table, adapter tables. A batch is padded to the next
size with the row of nobody. Steps with a prefill go another way.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.batch import HostBatch
from gpu_worker.device import to_device
from gpu_worker.history import History
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.tiles import make_tiles
from gpu_worker.pinned import PinnedRing
from gpu_worker.rows import RowTable

TILES = 4  # where tiles start in their tensor, behind their count
FAMILIES = (False, True)  # without LoRA, and with
STEPS_IN_FLIGHT = 2  # of the scheduler; a staging buffer is filled again after so many others


class StaticBatch(NamedTuple):
    """What a decode graph reads; one row per sequence."""

    rows: Tensor  # int64[size]
    positions: Tensor  # int64[size], of the token that is fed
    kv_slots: Tensor  # int64[size]
    page_table: Tensor  # int32[rows + 1, blocks], indexed by row
    tiles: Tensor  # int32[rows, 3], see kernels.tiles
    tile_count: Tensor  # int32[1]


def graph_sizes(rows: int) -> list[int]:
    """Batch sizes to capture: dense where a row more costs something, and the largest."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, 4097, 32)]
    return [*(size for size in sizes if size < rows), rows]


class DecodeGraphs:
    """Owns the graphs, their inputs and the page table on the device.

    forward  logits [size, vocabulary] of a static batch; with LoRA or without
    fits     whether the graphs with LoRA hold a step of these segments; None: any
    """

    def __init__(
        self,
        *,
        forward: Callable[[StaticBatch, bool], Tensor],
        history: History,
        null_block: int,
        block_tokens: int,
        rows: int,
        row_blocks: int,
        tile_height: int,
        fits: Callable[[Sequence[Segment]], bool] | None,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._fits = fits
        self._nobody = history.nobody
        self._null_slot = null_block * block_tokens
        self._device = device
        self._page_table = torch.full(
            (rows + 1, row_blocks), null_block, dtype=torch.int32, device=device
        )
        self._inputs = torch.empty((3 * rows,), dtype=torch.int64, device=device)
        self._staging = PinnedRing(buffers=STEPS_IN_FLIGHT + 1, shape=(3 * rows,), dtype=np.int64)
        self._tile_height = tile_height
        self._tiles = torch.zeros((TILES + 3 * rows,), dtype=torch.int32, device=device)
        self._tile_staging = PinnedRing(
            buffers=STEPS_IN_FLIGHT + 1, shape=(TILES + 3 * rows,), dtype=np.int32
        )
        self._sizes = graph_sizes(rows)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run what will be captured."""
        for lora in FAMILIES:
            for size in reversed(self._sizes):
                self._stage(np.empty(0, np.int64), np.empty(0, np.int64), size)
                self._forward(self._batch(size), lora)
                torch.cuda.synchronize()  # before the staging buffers are filled again

    @torch.inference_mode()
    def capture(self) -> None:
        """Make the graphs. What is compiled and allocated once has to be by now: see rehearse."""
        pool = None
        for lora in FAMILIES:
            for size in reversed(self._sizes):
                batch = self._batch(size)
                self._stage(np.empty(0, np.int64), np.empty(0, np.int64), size)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = self._forward(batch, lora)
                pool = graph.pool()
                self._graphs[size, lora] = (graph, logits)

    def holds(self, host: HostBatch) -> bool:
        """Whether a step can go this way."""
        decoded = host.sequences.decode_rows
        lora = bool(host.segments)
        return (
            0 < decoded == len(host.token_rows) <= self._sizes[-1]
            and (self._sizes[-1], lora) in self._graphs
            and (not lora or self._fits is None or self._fits(host.segments))
        )

    def run(self, host: HostBatch, started: Callable[[], None]) -> Tensor:
        """Logits [rows, vocabulary] in the order of the batch; they stand until the next run.
        `started` is called right before the graph is launched."""
        count = len(host.token_rows)
        size = next(size for size in self._sizes if size >= count)
        self._stage(host.token_rows, np.concatenate((host.positions, host.kv_slots)), size)
        if host.segments:
            self._stage_tiles(make_tiles(host.segments, self._tile_height))
        graph, logits = self._graphs[size, bool(host.segments)]
        started()
        graph.replay()
        return logits[:count]

    def pages_changed(self, rows: RowTable, changed: NDArray[np.int64]) -> None:
        """Take over the page tables of these rows."""
        if len(changed):
            pages = to_device(rows.page_table[changed].astype(np.int32), self._device)
            self._page_table.index_copy_(0, to_device(changed, self._device), pages)

    def _batch(self, size: int) -> StaticBatch:
        rows, positions, kv_slots = self._inputs[: 3 * size].view(3, size)
        tiles = self._tiles[TILES:].view(-1, 3)
        return StaticBatch(
            rows, positions, kv_slots, self._page_table, tiles[:size], self._tiles[:1]
        )

    def _stage_tiles(self, tiles: NDArray[np.int32]) -> None:
        staged = self._tile_staging.next()
        values, end = staged.numpy(), TILES + tiles.size
        values[0] = len(tiles)
        values[TILES:end] = tiles.ravel()
        self._tiles[:end].copy_(staged[:end], non_blocking=True)

    def _stage(self, rows: NDArray[np.int64], others: NDArray[np.int64], size: int) -> None:
        """others are the positions of these rows, then their KV slots."""
        count = len(rows)
        staged = self._staging.next()
        values = staged.numpy()[: 3 * size].reshape(3, size)
        values[0, :count], values[0, count:] = rows, self._nobody
        values[1:, :count] = others.reshape(2, count)
        values[1, count:], values[2, count:] = 0, self._null_slot
        self._inputs[: 3 * size].copy_(staged[: 3 * size], non_blocking=True)
