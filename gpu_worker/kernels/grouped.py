"""LoRA for CPUs, where a call costs more than the little arithmetic of a small segment.

Neighbouring segments are joined into a stretch and multiplied with the stacked matrices of all
its adapters, as long as the multiplications wasted on other tokens' adapters cost less than the
calls of one more segment. A segment of its own, such as a long chunk, uses its adapter's matrices
where they lie in the pool.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.kernels import Adapter, AddingPlan
from gpu_worker.kernels.segments import Segment
from gpu_worker.kernels.stacks import MOST_MODULES, Stack, StackCache

# Multiplications that take as long as the calls for one segment in all groups of one layer:
# 11 calls of 10 to 30 us each, at 50e9 to 150e9 multiplications per second.
SEGMENT_CALLS = 5_000_000
STACK_BYTES = 256 << 20
LEAST_STACK_BYTES = 16 << 20


def stack_bytes(pool_bytes: int) -> int:
    """For stacks, beside an adapter pool of this size: half as much."""
    return max(pool_bytes // 2, LEAST_STACK_BYTES)


class Stretch(NamedTuple):
    """Neighbouring segments that are computed together."""

    start: int
    end: int
    segments: list[Segment]
    adapters: dict[int, Adapter]  # by slot


class Grouped:
    """The kernels for a model.

    segment_calls  multiplications per layer that a stretch may waste instead of being two
    stack_bytes    memory for stacked matrices; what does not fit is not stacked
    """

    def __init__(
        self, *, segment_calls: int = SEGMENT_CALLS, stack_bytes: int = STACK_BYTES
    ) -> None:
        self._segment_calls = segment_calls
        self._stack_bytes = stack_bytes
        self._stacks = StackCache(stack_bytes)

    def plan(self, segments: list[Segment], adapters: Mapping[int, Adapter]) -> "_GroupedPlan":
        parts: list[_One | _Stacked] = []
        for stretch in self.stretches(segments, adapters):
            if len(stretch.segments) == 1:
                (adapter,) = stretch.adapters.values()
                parts.append(_One(stretch.start, stretch.end, adapter))
            else:
                parts.append(_Stacked(stretch, self._stacks.get([*stretch.adapters.values()])))
        return _GroupedPlan(parts)

    def stretches(self, segments: list[Segment], adapters: Mapping[int, Adapter]) -> list[Stretch]:
        """Join each segment with the stretch before it if that pays."""
        stretches: list[Stretch] = []
        for segment in segments:
            adapter = adapters[segment.slot]
            joined = self._join(stretches[-1], segment, adapter) if stretches else None
            if joined is None:
                alone = Stretch(segment.start, segment.end, [segment], {segment.slot: adapter})
                stretches.append(alone)
            else:
                stretches[-1] = joined
        return stretches

    def _join(self, stretch: Stretch, segment: Segment, adapter: Adapter) -> Stretch | None:
        members = {**stretch.adapters, segment.slot: adapter}
        nbytes = sum(member.nbytes for member in members.values())
        if MOST_MODULES * nbytes > self._stack_bytes:
            return None
        before = (stretch.end - stretch.start) * _multiplications(stretch.adapters)
        alone = (segment.end - segment.start) * _multiplications({segment.slot: adapter})
        together = (segment.end - stretch.start) * _multiplications(members)
        if together - before - alone > self._segment_calls:
            return None
        return Stretch(stretch.start, segment.end, [*stretch.segments, segment], members)


def _multiplications(adapters: Mapping[int, Adapter]) -> int:
    """Per token and layer: one for each element of the matrices."""
    return sum(
        adapter.nbytes // len(adapter.groups) // adapter.groups[0][0].lora_a.element_size()
        for adapter in adapters.values()
    )


class _One:
    """A segment with the matrices of its adapter where they are."""

    def __init__(self, start: int, end: int, adapter: Adapter) -> None:
        self._tokens = slice(start, end)
        self._groups = adapter.groups

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        lora_a, lora_b = self._groups[layer][group]
        if not lora_a.shape[0]:
            return
        h = F.linear(x[self._tokens], lora_a)
        rank = out = 0
        for b in lora_b:
            end = rank + b.shape[1]
            if end > rank:
                y[self._tokens, out : out + b.shape[0]].addmm_(h[:, rank:end], b.T)
            rank, out = end, out + b.shape[0]


class _Stacked:
    """Several segments with the stacked matrices of a set that holds their adapters."""

    def __init__(self, stretch: Stretch, stack: Stack) -> None:
        self._tokens = slice(stretch.start, stretch.end)
        self._groups = stack.groups
        position = {version: index for index, version in enumerate(stack.versions)}
        owner = np.full(stretch.end - stretch.start, -1)  # tokens of the base model: nobody
        for segment in stretch.segments:
            tokens = slice(segment.start - stretch.start, segment.end - stretch.start)
            owner[tokens] = position[stretch.adapters[segment.slot].version]
        self._foreign = [  # bool[tokens, ranks]: this rank is not the token's adapter's
            torch.from_numpy(owner[:, None] != of_ranks[None, :]) for of_ranks in stack.owners
        ]

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        stacked = self._groups[layer][group]
        if stacked is None:
            return
        h = stacked.lora_a(x[self._tokens]).masked_fill_(self._foreign[stacked.owners], 0)
        y[self._tokens] += stacked.lora_b(h)


class _GroupedPlan(AddingPlan):
    def __init__(self, parts: list[_One | _Stacked]) -> None:
        self._parts = parts

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        for part in self._parts:
            part.add(y, x, layer, group)
