"""Where the matrices of each slot's adapter lie, as a table in device memory.

A row per slot, int64[HEAD + layers * modules * RECORD]:

    head      for each group, the largest of its stacked ranks over the layers; for each module,
              the largest of its ranks
    records   layer after layer, for each module: address of A, address of B, rank,
              and where its ranks start in the group's stacked A

A module without an adapter has rank 0, and the address at which its A would start, so that the
first module's address is the address of the group's stacked A in any case.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.adapter_layout import ALIGNMENT, GROUPS, MODULES, ModuleShape

MODULE_HEAD = len(GROUPS)  # where those of the modules start
HEAD = MODULE_HEAD + len(MODULES)
RECORD = 4
LORA_A, LORA_B, RANK, START = range(RECORD)


class AdapterTables:
    """Owns the table. A slot that was never filled has no adapter at all: all ranks are 0."""

    def __init__(
        self,
        *,
        shapes: Sequence[ModuleShape],
        layers: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for shape in shapes:
            if shape.in_features * dtype.itemsize % ALIGNMENT:
                raise ValueError(
                    f"a row of {shape.in_features} elements of {dtype} is not a multiple of "
                    f"{ALIGNMENT} bytes: the As of a group are not one matrix"
                )
        self.dtype = dtype
        self.out_bytes = [shape.out_features * dtype.itemsize for shape in shapes]
        self.max_ranks = np.zeros((slots, len(MODULES)), np.int64)  # of each slot, over the layers
        self._layers = layers
        self._sizes = _Sizes(shapes, dtype.itemsize)
        self.table = torch.zeros((slots, self.row_elements(layers)), dtype=torch.int64).to(device)
        staging = torch.zeros_like(self.table, device="cpu")
        self._staging = staging.pin_memory() if device.type == "cuda" else staging

    @staticmethod
    def row_elements(layers: int) -> int:
        return HEAD + layers * len(MODULES) * RECORD

    @staticmethod
    def record(layer: int, module: int) -> int:
        """Where in a slot's row the record of a module in a layer starts."""
        return HEAD + (layer * len(MODULES) + module) * RECORD

    def fill(self, slot: int, address: int, ranks: Sequence[int]) -> None:
        """The adapter at this device address is in this slot from now on.

        ranks  [layers * modules]

        One copy of a few kilobytes out of pinned memory, on the current stream; the slot must not
        be filled again before it has ended.
        """
        row = self._sizes.row(np.asarray(ranks, np.int64), address)
        if len(row) != self.table.shape[1]:
            raise ValueError(f"{len(ranks)} ranks for {self._layers} layers")
        self.max_ranks[slot] = row[MODULE_HEAD:HEAD]
        staged = self._staging[slot]
        staged.numpy()[:] = row
        self.table[slot].copy_(staged, non_blocking=True)

    def shift(self, slot: int, nbytes: int) -> None:
        """The adapter in this slot lies so many bytes further on; as `fill`."""
        records = self._staging[slot, HEAD:].view(-1, RECORD)
        records[:, :RANK] += nbytes  # both addresses
        self.table[slot].copy_(self._staging[slot], non_blocking=True)

    def layer_bytes(self, ranks: Sequence[int]) -> NDArray[np.int64]:
        """[layers]: what each layer of an adapter takes, packed.

        ranks  [layers * modules]
        """
        return self._sizes.layer_bytes(np.asarray(ranks, np.int64))


class _Sizes:
    """pipeline.adapter_layout.layout in numpy, which takes a tenth of its time."""

    def __init__(self, shapes: Sequence[ModuleShape], element_bytes: int) -> None:
        self._in = np.array([shape.in_features for shape in shapes]) * element_bytes
        self._out = np.array([shape.out_features for shape in shapes]) * element_bytes
        order: list[int] = []  # of A (0 to 6) and B (7 to 13) within a layer
        for group in GROUPS:
            order += [*group, *(len(MODULES) + module for module in group)]
        self._order = np.array(order)

    def row(self, ranks: NDArray[np.int64], address: int) -> NDArray[np.int64]:
        of_layers = ranks.reshape(-1, len(MODULES))
        offsets = address + self._offsets(of_layers)
        row = np.empty(HEAD + of_layers.size * RECORD, np.int64)
        records = row[HEAD:].reshape(-1, len(MODULES), RECORD)
        records[..., LORA_A] = offsets[:, : len(MODULES)]
        records[..., LORA_B] = offsets[:, len(MODULES) :]
        records[..., RANK] = of_layers
        for index, group in enumerate(GROUPS):
            ends = np.cumsum(of_layers[:, group[0] : group[-1] + 1], axis=1)
            records[:, group[0] : group[-1] + 1, START] = (
                ends - of_layers[:, group[0] : group[-1] + 1]
            )
            row[index] = ends[:, -1].max()
        row[MODULE_HEAD:HEAD] = of_layers.max(axis=0)
        return row

    def layer_bytes(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        taken: NDArray[np.int64] = self._taken(ranks.reshape(-1, len(MODULES))).sum(axis=1)
        return taken

    def _taken(self, of_layers: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[layers, 2 * modules]: bytes of each A, then of each B, with what fills them up."""
        nbytes = np.concatenate((of_layers * self._in, of_layers * self._out), axis=1)
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def _offsets(self, of_layers: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[layers, 2 * modules]: of each A, then of each B, from the adapter's start."""
        taken = self._taken(of_layers)[:, self._order]
        ends = np.cumsum(taken).reshape(taken.shape)
        offsets = np.empty_like(ends)
        offsets[:, self._order] = ends - taken
        return offsets
