"""LoRA in the plainest torch, segment by segment: the oracle of every other kernel."""

from collections.abc import Mapping

from torch import Tensor

from gpu_worker.kernels import Adapter, AddingPlan, GroupWeights
from gpu_worker.kernels.segments import Segment


def shrink(x: Tensor, lora_a: Tensor) -> Tensor:
    """Project the tokens of one segment down to the ranks of a group.

    x        [tokens, in]   compute dtype
    lora_a   [ranks, in]    compute dtype
    returns  [tokens, ranks] fp32
    """
    return x.float() @ lora_a.float().T


def expand(y: Tensor, h: Tensor, lora_b: tuple[Tensor, ...]) -> None:
    """Add what the modules of a group make of the shrunk tokens of one segment.

    y       [tokens, sum of out]  compute dtype; changed
    h       [tokens, sum of ranks] fp32
    lora_b  one [out, rank] per module
    """
    rank = out = 0
    for b in lora_b:
        columns = slice(out, out + b.shape[0])
        added = h[:, rank : rank + b.shape[1]] @ b.float().T
        y[:, columns] = (y[:, columns].float() + added).to(y.dtype)
        rank, out = rank + b.shape[1], out + b.shape[0]


class Reference:
    """The kernels above, for a whole step."""

    def plan(self, segments: list[Segment], adapters: Mapping[int, Adapter]) -> "_ReferencePlan":
        return _ReferencePlan([(s, adapters[s.slot].groups) for s in segments])


class _ReferencePlan(AddingPlan):
    def __init__(
        self, segments: list[tuple[Segment, tuple[tuple[GroupWeights, ...], ...]]]
    ) -> None:
        self._segments = segments

    def add(self, y: Tensor, x: Tensor, layer: int, group: int) -> None:
        for (start, end, _), groups in self._segments:
            weights = groups[layer][group]
            expand(y[start:end], shrink(x[start:end], weights.lora_a), weights.lora_b)
