"""Adapters on their way to the device: copied in runs of whole layers, and waited for as such.

The first layers of a step run while the last ones of its adapter are still being copied.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

CHUNKS = 8  # of an adapter at most
CHUNK_BYTES = 2 << 20  # at least; about 40 µs from host memory, three times what a launch takes


class Chunk(NamedTuple):
    """Layers first_layer to the next chunk's; bytes start to end (exclusive) of the adapter."""

    first_layer: int
    start: int
    end: int


def make_chunks(layer_bytes: NDArray[np.int64]) -> list[Chunk]:
    """Cut an adapter into runs of whole layers, of about the same size.

    layer_bytes  [layers]; the adapter is its layers one after the other
    returns      at least one chunk, which together hold all layers and bytes
    """
    ends = np.cumsum(layer_bytes)
    total = int(ends[-1])
    count = min(CHUNKS, max(total // CHUNK_BYTES, 1))
    chunks: list[Chunk] = []
    layer = start = 0
    for number in range(1, count + 1):
        last = int(np.searchsorted(ends, number * total / count)) if number < count else -1
        end = int(ends[last])
        if end > start or not chunks:
            chunks.append(Chunk(layer, start, end))
            layer, start = last + 1, end
    return chunks


class Arrival(NamedTuple):
    """An adapter on its way: when an event has come, so have the layers from there on, up to the
    next event's. The first is that of layer 0."""

    events: tuple[tuple[int, torch.cuda.Event], ...]

    @property
    def is_over(self) -> bool:
        return bool(self.events[-1][1].query())  # type: ignore[no-untyped-call]


class Arrivals:
    """What one step waits for. It is the stream that waits, never the host."""

    def __init__(self, arrivals: Iterable[Arrival]) -> None:
        self._events: dict[int, list[torch.cuda.Event]] = {}  # by layer
        for arrival in arrivals:
            for layer, event in arrival.events:
                self._events.setdefault(layer, []).append(event)

    def enter(self, layer: int) -> None:
        """What is launched from now on may read this layer of the adapters. To be called for all
        layers in order, since each call waits for what has come since the one before."""
        for event in self._events.pop(layer, ()):
            torch.cuda.current_stream().wait_event(event)

    def enter_all(self) -> None:
        """What is launched from now on may read all of the adapters."""
        for layer in sorted(self._events):
            self.enter(layer)
