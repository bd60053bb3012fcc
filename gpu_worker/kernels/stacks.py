"""The matrices of a set of adapters, stacked, so that one multiplication serves them all.

For each layer and group: the As of all adapters as one matrix, module by module, and the Bs of all
adapters and modules as one block-diagonal matrix. A token is multiplied with everybody's A; what is
not its own adapter's is then set to zero, and so nobody else's B adds anything. Both are linear
layers, packed as the base model's are; the zeros of the block diagonal cost less than a call for
each module.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.kernels import Adapter, GroupWeights
from gpu_worker.layers.linear import Linear, make_linear

MOST_MODULES = 3  # of a group: how often a B may stand in its block-diagonal matrix


class StackedGroup(NamedTuple):
    """One group of one layer for a set of adapters, of which at least one has it."""

    lora_a: Linear  # in -> ranks
    lora_b: Linear  # ranks -> the outputs of the group's modules, side by side
    owners: int  # index into Stack.owners


class Stack(NamedTuple):
    """A set of adapters, stacked.

    nbytes         of the stacked matrices, as they lie in memory
    adapter_bytes  of the adapters themselves
    owners         the different answers to: whose is each rank of a group? As positions in
                   `versions`
    """

    versions: tuple[int, ...]
    nbytes: int
    adapter_bytes: int
    groups: tuple[tuple[StackedGroup | None, ...], ...]  # [layer][group]
    owners: tuple[NDArray[np.int64], ...]


def make_stack(adapters: Sequence[Adapter]) -> Stack:
    """Copies the matrices, at most `MOST_MODULES` times."""
    stacking = _Stacking()
    groups = tuple(
        tuple(stacking.group(members) for members in zip(*layers, strict=True))
        for layers in zip(*(adapter.groups for adapter in adapters), strict=True)
    )
    return Stack(
        versions=tuple(adapter.version for adapter in adapters),
        nbytes=stacking.nbytes,
        adapter_bytes=sum(adapter.nbytes for adapter in adapters),
        groups=groups,
        owners=tuple(of_ranks for _, of_ranks in stacking.owners.values()),
    )


class _Stacking:
    """Stacks group after group, and counts what that takes."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.owners: dict[bytes, tuple[int, NDArray[np.int64]]] = {}

    def group(self, members: Sequence[GroupWeights]) -> StackedGroup | None:
        a_parts, b_parts, of_ranks = [], [], []
        taken = [0] * len(members)  # rows of each member's A
        for module in range(len(members[0].lora_b)):
            of_module = [member.lora_b[module] for member in members]
            for index, (member, b) in enumerate(zip(members, of_module, strict=True)):
                a_parts.append(member.lora_a[taken[index] : taken[index] + b.shape[1]])
                of_ranks.append(np.full(b.shape[1], index))
                taken[index] += b.shape[1]
            b_parts.append(torch.cat(of_module, dim=1))
        if not any(taken):
            return None
        lora_a = torch.cat(a_parts)
        lora_b: Tensor = torch.block_diag(*b_parts)  # type: ignore[no-untyped-call]
        owner = np.concatenate(of_ranks)
        number, _ = self.owners.setdefault(owner.tobytes(), (len(self.owners), owner))
        stacked = StackedGroup(make_linear(lora_a), make_linear(lora_b), number)
        self.nbytes += stacked.lora_a.nbytes + stacked.lora_b.nbytes
        return stacked


class StackCache:
    """The stacks of the sets that were used last, up to `nbytes`.

    A set that is part of a stacked one is served by that stack, as long as this wastes less than
    half of it: requests end one by one, and each end would otherwise cost a new stack.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._held = 0
        self._stacks: OrderedDict[frozenset[int], Stack] = OrderedDict()

    def get(self, adapters: Sequence[Adapter]) -> Stack:
        """A stack that holds these adapters, no two of the same version. The caller's for a step,
        whatever else is asked for."""
        wanted = frozenset(adapter.version for adapter in adapters)
        nbytes = sum(adapter.nbytes for adapter in adapters)
        for versions, stack in reversed(self._stacks.items()):
            if wanted <= versions and stack.adapter_bytes <= 2 * nbytes:
                self._stacks.move_to_end(versions)
                return stack
        stack = make_stack(adapters)
        self._stacks[wanted] = stack
        self._held += stack.nbytes
        while self._held > self._nbytes:
            _, oldest = self._stacks.popitem(last=False)
            self._held -= oldest.nbytes
        return stack
