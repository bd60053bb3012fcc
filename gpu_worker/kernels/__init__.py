"""LoRA kernels: y += B A x for tokens of many adapters, and what they are given.

A group is a set of modules that read the same input (adapter_layout.GROUPS); their outputs stand
side by side in one tensor.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from gpu_worker.kernels.segments import Segment
from gpu_worker.layers import GATE_UP, LayerOps, Linears
from gpu_worker.layers.linear import Linear


class GroupWeights(NamedTuple):
    """The matrices of one adapter for one group of one layer, in the compute dtype."""

    lora_a: Tensor  # [sum of the modules' ranks, in]
    lora_b: tuple[Tensor, ...]  # one [out, rank] per module of the group, by columns; rank may be 0


class Adapter(NamedTuple):
    """A resident adapter; its tensors lie in the adapter pool.

    version  no other adapter has it, not even the next one in the same slot
    """

    version: int
    nbytes: int
    groups: tuple[tuple[GroupWeights, ...], ...]  # [layer][group]


class AddingPlan:
    """Linears that add to what the base model's product gave."""

    def apply(self, linear: Linear, x: Tensor, layer: int, group: int) -> Tensor:
        """See Linears."""
        y = linear(x)
        self.add(y, x, layer, group)
        return y

    def gated(self, linear: Linear, x: Tensor, layer: int, ops: LayerOps) -> Tensor:
        """See Linears."""
        return ops.silu_mul(self.apply(linear, x, layer, GATE_UP))

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        """y += B A x."""
        raise NotImplementedError


class LoraKernels(Protocol):
    def plan(self, segments: list[Segment], adapters: Mapping[int, Adapter]) -> Linears:
        """The linear layers of a step, each token with its own adapter, if it has one. Called once
        per step, before its first layer; adapters is by slot."""
        ...
