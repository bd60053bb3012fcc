"""The matrices of a set of adapters, stacked, so that one multiplication serves them all.

For each layer and group: the As of all adapters as one matrix, module by module, and for each
module the Bs of all adapters side by side. A token is multiplied with everybody's A; what is not
its own adapter's is then set to zero, and so nobody else's B adds anything.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.kernels import Adapter, GroupWeights


class StackedModule(NamedTuple):
    """One module's part of a stacked group."""

    ranks: slice  # its columns of what shrink gives
    out: slice  # its columns of the group's output
    lora_b: Tensor  # [ranks, out], a transposed view


class StackedGroup(NamedTuple):
    """One group of one layer for a set of adapters."""

    lora_a: Tensor  # [ranks, in]; no rows where no adapter has the group
    modules: tuple[StackedModule, ...]  # those that some adapter has
    owners: int  # index into Stack.owners


class Stack(NamedTuple):
    """A set of adapters, stacked.

    owners  the different answers to: whose is each row of lora_a? As positions in `versions`
    """

    versions: tuple[int, ...]
    nbytes: int
    groups: tuple[tuple[StackedGroup, ...], ...]  # [layer][group]
    owners: tuple[NDArray[np.int64], ...]


def make_stack(adapters: Sequence[Adapter]) -> Stack:
    """Copies the matrices: about twice the adapters' bytes move."""
    owners: dict[bytes, tuple[int, NDArray[np.int64]]] = {}
    groups = tuple(
        tuple(_stack_group(members, owners) for members in zip(*layers, strict=True))
        for layers in zip(*(adapter.groups for adapter in adapters), strict=True)
    )
    return Stack(
        versions=tuple(adapter.version for adapter in adapters),
        nbytes=sum(adapter.nbytes for adapter in adapters),
        groups=groups,
        owners=tuple(of_rows for _, of_rows in owners.values()),
    )


def _stack_group(
    members: Sequence[GroupWeights], owners: dict[bytes, tuple[int, NDArray[np.int64]]]
) -> StackedGroup:
    modules: list[StackedModule] = []
    a_parts: list[Tensor] = []
    ranks: list[list[int]] = []
    taken = [0] * len(members)  # rows of each member's A
    rank = out = 0
    for module, first in enumerate(members[0].lora_b):
        of_module = [member.lora_b[module] for member in members]
        ranks.append([b.shape[1] for b in of_module])
        for index, member in enumerate(members):
            a_parts.append(member.lora_a[taken[index] : taken[index] + ranks[-1][index]])
            taken[index] += ranks[-1][index]
        total = sum(ranks[-1])
        if total:
            columns = slice(out, out + first.shape[0])
            b = torch.cat(of_module, dim=1)
            modules.append(StackedModule(slice(rank, rank + total), columns, b.T))
        rank, out = rank + total, out + first.shape[0]
    of_rows = np.concatenate([np.repeat(np.arange(len(members)), r) for r in ranks])
    index, _ = owners.setdefault(of_rows.tobytes(), (len(owners), of_rows))
    return StackedGroup(torch.cat(a_parts), tuple(modules), index)


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
            if wanted <= versions and stack.nbytes <= 2 * nbytes:
                self._stacks.move_to_end(versions)
                return stack
        stack = make_stack(adapters)
        self._stacks[wanted] = stack
        self._held += stack.nbytes
        while self._held > self._nbytes:
            _, oldest = self._stacks.popitem(last=False)
            self._held -= oldest.nbytes
        return stack
