"""What the LoRA kernels know of a step: worked out on the device, once for all layers.

The stacked ranks of a group are cut into blocks of `rank_block`; a tile and one of its blocks is
an entry, and what the shrink kernel's programs share out. A tile without an adapter has one entry
in each group all the same, because kernels that do more than LoRA must see its tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRY = 8  # int32 per entry: first token, count, slot, first rank, rows of h before it; padded
GROUPS = 4
ALIGNED = 4  # int32 to a border of 16 bytes, where the compiler likes tables to start


class GroupTables(NamedTuple):
    """What `plan_kernel` makes of the tiles for one group."""

    entries: Tensor  # int32[most entries, ENTRY]
    entry_count: Tensor  # int32[1]
    h_rows: Tensor  # int32[most tiles]: rows of h before each tile's


class StepTables(NamedTuple):
    """Tiles as they were given, and what was made of them; valid until the next step's."""

    tiles: Tensor  # int32[tiles, 3]: first token, count, slot
    tile_count: Tensor  # int32[1]
    groups: list[GroupTables]


class PlanBuffers:
    """Owns the tables that plan_kernel fills."""

    def __init__(self, *, most_tiles: int, most_entries: int, device: torch.device) -> None:
        self.most_tiles = -(-most_tiles // ALIGNED) * ALIGNED
        self.entries = torch.zeros((GROUPS, most_entries, ENTRY), dtype=torch.int32, device=device)
        self.entry_counts = torch.zeros((GROUPS, ALIGNED), dtype=torch.int32, device=device)
        self.h_rows = torch.zeros((GROUPS, self.most_tiles), dtype=torch.int32, device=device)
        self._groups = [
            GroupTables(self.entries[group], self.entry_counts[group], self.h_rows[group])
            for group in range(GROUPS)
        ]

    def plan(self, tiles: Tensor, tile_count: Tensor, table: Tensor, rank_block: int) -> StepTables:
        """tiles has at most most_tiles rows; table is of AdapterTables."""
        bound = max(min(len(tiles), self.most_tiles), 1)
        plan_kernel[(bound, GROUPS)](
            tiles,
            tile_count,
            table,
            table.stride(0),
            self.entries,
            self.entry_counts,
            self.h_rows,
            self.most_tiles,
            self.entries.shape[1],
            BLOCK_T=triton.next_power_of_2(bound + 1),
            BLOCK_R=rank_block,
            ENTRY_SIZE=ENTRY,
            COUNT_STRIDE=ALIGNED,
        )
        return StepTables(tiles, tile_count, self._groups)


@triton.jit
def share(items, programs, most):
    """How many programs work on each of these items: at least one, at most `most`."""
    return tl.minimum(tl.maximum(programs // tl.maximum(items, 1), 1), most)


@triton.jit
def plan_kernel(
    tiles,
    tile_count,
    table,
    table_stride,
    entries,
    entry_counts,
    h_rows,
    most_tiles,
    most_entries,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ENTRY_SIZE: tl.constexpr,
    COUNT_STRIDE: tl.constexpr,
):
    """Program (tile, group) writes the entries of its tile; BLOCK_T is at least most_tiles."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    n = tl.load(tile_count)
    if (tile >= n) & (tile > 0):
        return
    ids = tl.arange(0, BLOCK_T)
    used = ids < n
    count = tl.load(tiles + ids * 3 + 1, mask=used, other=0)
    slot = tl.load(tiles + ids * 3 + 2, mask=used, other=-1)
    row = table + slot.to(tl.int64) * table_stride
    rank = tl.load(row + group, mask=slot >= 0, other=0).to(tl.int32)
    blocks = tl.where(used, tl.maximum((rank + BLOCK_R - 1) // BLOCK_R, 1), 0)
    if tile == 0:
        tl.store(entry_counts + group * COUNT_STRIDE, tl.sum(blocks))
    entry = tl.sum(tl.where(ids < tile, blocks, 0))
    h_row = tl.sum(tl.where(ids < tile, blocks * count, 0))
    mine = tl.sum(tl.where(ids == tile, blocks, 0))
    my_count = tl.sum(tl.where(ids == tile, count, 0))
    my_slot = tl.sum(tl.where(ids == tile, slot, 0))
    first = tl.load(tiles + tile * 3, mask=tile < n, other=0)
    tl.store(h_rows + group * most_tiles + tile, h_row)
    target = entries + (group.to(tl.int64) * most_entries + entry) * ENTRY_SIZE
    for block in range(mine):
        tl.store(target, first)
        tl.store(target + 1, my_count)
        tl.store(target + 2, my_slot)
        tl.store(target + 3, block * BLOCK_R)
        tl.store(target + 4, h_row + block * my_count)
        target += ENTRY_SIZE
