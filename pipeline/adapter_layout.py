"""How a LoRA adapter is packed into one run of bytes: pure arithmetic, for loader and worker.

Layer after layer, and in each layer group after group of modules that read the same input:

    q, k, v | o | gate, up | down

A group is the A matrices of its modules, stacked, then their B matrices, transposed:

    A_q [r_q, in]  A_k [r_k, in]  A_v [r_v, in]
    B_q' [r_q, out_q]  B_k' [r_k, out_k]  B_v' [r_v, out_v]

all row-major in the compute dtype, with the scaling folded into B. So a rank is a row of A and a
row of B', and kernels can gather those of many adapters as one matrix. Ranks are exact and may
differ from module to module and layer to layer; a missing module has rank 0 and takes no bytes.
Each matrix starts on an ALIGNMENT border, so the As of a group are one matrix [r_q + r_k + r_v, in]
wherever a row of A is a multiple of that, as it is for all usual models.
"""

from array import array
from collections.abc import Sequence

import msgspec

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # indices into MODULES
ALIGNMENT = 16  # bytes
MAX_RANK = 512


class ModuleShape(msgspec.Struct, frozen=True):
    """A linear layer of the base model, weight [out, in]."""

    out_features: int
    in_features: int


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where the matrices of one module in one layer lie, in bytes from the adapter's start."""

    rank: int  # 0: the module has no adapter
    a_offset: int
    b_offset: int


class AdapterLayout(msgspec.Struct, frozen=True):
    """Where everything lies: placements[layer * len(MODULES) + module]."""

    placements: tuple[Placement, ...]
    nbytes: int

    def at(self, layer: int, module: int) -> Placement:
        return self.placements[layer * len(MODULES) + module]


def pack_ranks(ranks: Sequence[int]) -> bytes:
    """int16[layers, modules] as it travels in messages."""
    return array("h", ranks).tobytes()


def unpack_ranks(ranks: bytes) -> Sequence[int]:
    return array("h", ranks)


def layout(
    ranks: Sequence[int], shapes: Sequence[ModuleShape], element_bytes: int
) -> AdapterLayout:
    """Place an adapter.

    ranks          [layers * len(MODULES)], layer by layer
    shapes         [len(MODULES)], the same for every layer
    element_bytes  of the compute dtype
    """
    if len(ranks) % len(MODULES):
        raise ValueError(f"{len(ranks)} ranks are not whole layers of {len(MODULES)} modules")
    placements: list[Placement] = []
    end = 0

    def take(elements: int) -> int:
        nonlocal end
        start = end
        end += -(-elements * element_bytes // ALIGNMENT) * ALIGNMENT
        return start

    for first in range(0, len(ranks), len(MODULES)):
        for group in GROUPS:
            of_group = [ranks[first + module] for module in group]
            a = [take(r * shapes[m].in_features) for m, r in zip(group, of_group, strict=True)]
            b = [take(r * shapes[m].out_features) for m, r in zip(group, of_group, strict=True)]
            placements += [Placement(*place) for place in zip(of_group, a, b, strict=True)]
    return AdapterLayout(tuple(placements), end)
