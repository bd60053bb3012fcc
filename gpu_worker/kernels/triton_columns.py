"""The ranks of a decode step's adapters as columns, side by side, as if they were one adapter's.

A module's h is a matrix [rows, columns]: RANKS columns for every block of ranks of every adapter
that has tokens in the step, then empty ones up to a multiple of PADDING. Gate and up have the same
columns. A column belongs to a run of rows, those of its adapter; in all others it is 0. With it
comes the address of its row of B' (adapter_layout) in each layer; a column without one, because it
is padding or beyond the rank in that layer, has that of a row of zeros.

All of this is worked out on the device, once per step for all layers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.kernels.adapter_tables import LORA_B, MODULE_HEAD, RANK, RECORD, AdapterTables
from pipeline.adapter_layout import MAX_RANK, MODULES

RANKS = 16  # of a block: the least that a tensor core multiplies
PADDING = 64  # columns that are multiplied at once
MOST_BLOCKS = MAX_RANK // RANKS
TILE_ROWS = 16  # of a tile that is not the last of its run
ENTRY = 8  # int32 per entry: first row, rows, slot, first rank, first column; padded


class Columns(NamedTuple):
    """Of a step; one row per module."""

    entries: Tensor  # int32[modules, most entries, ENTRY]: a tile and a block of its ranks
    entry_counts: Tensor  # int32[modules]
    counts: Tensor  # int32[modules]: columns, a multiple of PADDING
    h: Tensor  # [modules, rows, most columns], 0 until a shrink writes the rows of each run
    addresses: Tensor  # int64[layers, modules, most columns]: of each column's row of B'


class ColumnBuffers:
    """Owns the Columns that `plan` fills.

    rows     the most of a step
    columns  the most of a step; a multiple of PADDING
    zeros    address of as many zeros as a row of B' has elements
    """

    def __init__(
        self, *, tables: AdapterTables, layers: int, rows: int, columns: int, zeros: int
    ) -> None:
        device = tables.table.device
        self._table = tables.table
        self._layers, self._rows, self._zeros = layers, rows, zeros
        self._out_bytes = torch.tensor(tables.out_bytes, dtype=torch.int32).to(device)
        modules = len(MODULES)
        self.columns = Columns(
            entries=torch.zeros(
                (modules, MOST_BLOCKS * rows // TILE_ROWS + columns // RANKS, ENTRY),
                dtype=torch.int32,
                device=device,
            ),
            entry_counts=torch.zeros(modules, dtype=torch.int32, device=device),
            counts=torch.zeros(modules, dtype=torch.int32, device=device),
            h=torch.zeros((modules, rows, columns), dtype=tables.dtype, device=device),
            addresses=torch.zeros((layers, modules, columns), dtype=torch.int64, device=device),
        )

    def plan(self, tiles: Tensor, tile_count: Tensor) -> Columns:
        """Valid until the next step's.

        tiles       int32[n, 3], of make_tiles, in the order of their rows, none of the base model
        tile_count  int32[1], how many of them there are
        """
        bound = max(min(len(tiles), self._rows), 1)
        columns = self.columns
        plan_kernel[(bound, len(MODULES))](
            tiles,
            tile_count,
            self._table,
            self._table.stride(0),
            self._out_bytes,
            self._zeros,
            columns.entries,
            columns.entry_counts,
            columns.counts,
            columns.h,
            columns.addresses,
            columns.entries.shape[1],
            columns.h.shape[2],
            ROWS=self._rows,
            ROWS_P2=triton.next_power_of_2(self._rows),
            LAYERS=self._layers,
            LAYERS_P2=triton.next_power_of_2(self._layers),
            BLOCK_T=triton.next_power_of_2(bound + 1),
            MODULES=len(MODULES),
            MODULE_HEAD=MODULE_HEAD,
            RECORDS=AdapterTables.record(0, 0),
            RECORD=RECORD,
            LORA_B=LORA_B,
            RANK=RANK,
            GATE=MODULES.index("gate_proj"),
            UP=MODULES.index("up_proj"),
            ENTRY_SIZE=ENTRY,
            RANKS=RANKS,
            PADDING=PADDING,
        )
        return columns


@triton.jit
def _clear(
    h, module, columns, start, end, most_columns,
    ROWS: tl.constexpr, ROWS_P2: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h is 0 in those of these columns that are from start to end."""
    row = tl.arange(0, ROWS_P2)
    place = h + ((module.to(tl.int64) * ROWS + row) * most_columns)[:, None] + columns[None, :]
    mask = (row < ROWS)[:, None] & ((columns >= start) & (columns < end))[None, :]
    tl.store(place, tl.zeros((ROWS_P2, COLUMNS), h.dtype.element_ty), mask=mask)


@triton.jit
def plan_kernel(
    tiles, tile_count, table, table_stride, out_bytes, zeros, entries, entry_counts, counts, h,
    addresses, most_entries, most_columns,
    ROWS: tl.constexpr, ROWS_P2: tl.constexpr, LAYERS: tl.constexpr, LAYERS_P2: tl.constexpr,
    BLOCK_T: tl.constexpr, MODULES: tl.constexpr,
    MODULE_HEAD: tl.constexpr, RECORDS: tl.constexpr, RECORD: tl.constexpr, LORA_B: tl.constexpr,
    RANK: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, ENTRY_SIZE: tl.constexpr,
    RANKS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Program (tile, module) writes the entries of its tile; that of a run's first tile, also its
    columns; that of the first tile, also the counts and the padding."""
    tile = tl.program_id(0)
    module = tl.program_id(1)
    n = tl.load(tile_count)
    if (tile >= n) & (tile > 0):
        return
    ids = tl.arange(0, BLOCK_T)
    used = ids < n
    first = tl.load(tiles + ids * 3, mask=used, other=0)
    count = tl.load(tiles + ids * 3 + 1, mask=used, other=0)
    slot = tl.load(tiles + ids * 3 + 2, mask=used, other=-1)
    before = used & (ids > 0)
    slot_before = tl.load(tiles + ids * 3 - 1, mask=before, other=-1)
    end_before = tl.load(tiles + ids * 3 - 3, mask=before, other=0)
    end_before += tl.load(tiles + ids * 3 - 2, mask=before, other=0)
    starts = used & ((ids == 0) | (slot != slot_before) | (first != end_before))
    head = table + slot.to(tl.int64) * table_stride + MODULE_HEAD + module
    rank = tl.load(head, mask=used, other=0).to(tl.int32)
    if (module == GATE) | (module == UP):  # which have the same columns
        other = head + tl.where(module == GATE, UP - GATE, GATE - UP)
        rank = tl.maximum(rank, tl.load(other, mask=used, other=0).to(tl.int32))
    blocks = (rank + RANKS - 1) // RANKS
    of_runs = tl.where(starts, blocks, 0)

    total = tl.sum(of_runs) * RANKS
    padded = (total + PADDING - 1) // PADDING * PADDING
    layer = tl.arange(0, LAYERS_P2)
    of_layer = (layer * MODULES + module).to(tl.int64)[:, None] * most_columns
    if tile == 0:
        tl.store(entry_counts + module, tl.sum(blocks))
        tl.store(counts + module, padded)
        empty = total + tl.arange(0, PADDING)
        _clear(h, module, empty, total, padded, most_columns, ROWS, ROWS_P2, PADDING)
        nothing = tl.zeros((LAYERS_P2, PADDING), tl.int64) + zeros
        mask = (layer < LAYERS)[:, None] & (empty < padded)[None, :]
        tl.store(addresses + of_layer + empty[None, :], nothing, mask=mask)

    my_blocks = tl.sum(tl.where(ids == tile, blocks, 0))
    my_slot = tl.sum(tl.where(ids == tile, slot, 0))
    my_first = tl.sum(tl.where(ids == tile, first, 0))
    my_count = tl.sum(tl.where(ids == tile, count, 0))
    is_start = tl.sum(tl.where((ids == tile) & starts, 1, 0))
    column = (tl.sum(tl.where(ids <= tile, of_runs, 0)) - my_blocks) * RANKS
    entry = tl.sum(tl.where(ids < tile, blocks, 0))
    target = entries + (module.to(tl.int64) * most_entries + entry) * ENTRY_SIZE
    for block in range(my_blocks):
        tl.store(target, my_first)
        tl.store(target + 1, my_count)
        tl.store(target + 2, my_slot)
        tl.store(target + 3, block * RANKS)
        tl.store(target + 4, column + block * RANKS)
        target += ENTRY_SIZE
    if is_start == 1:
        r = tl.arange(0, RANKS)
        record = table + my_slot.to(tl.int64) * table_stride + RECORDS
        record += (layer * MODULES + module) * RECORD
        address = tl.load(record + LORA_B, mask=layer < LAYERS, other=0)
        rank_of_layer = tl.load(record + RANK, mask=layer < LAYERS, other=0).to(tl.int32)
        row_bytes = tl.load(out_bytes + module).to(tl.int64)
        for block in range(my_blocks):
            columns = column + block * RANKS + r
            _clear(h, module, columns, 0, most_columns, most_columns, ROWS, ROWS_P2, RANKS)
            of_rank = block * RANKS + r
            rows = address[:, None] + of_rank.to(tl.int64)[None, :] * row_bytes
            rows = tl.where(of_rank[None, :] < rank_of_layer[:, None], rows, zeros)
            mask = (layer < LAYERS)[:, None]
            tl.store(addresses + of_layer + columns[None, :], rows, mask=mask)
