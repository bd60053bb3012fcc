"""Checkpoints that are merged while they are packed: no part takes room in the arena."""

from collections.abc import Sequence

import msgspec

from adapter_loader.checkpoint import DTYPES, BaseModel, LoraModule, Modules, module_name
from adapter_loader.merging import Term, merge_module
from adapter_loader.packing import (
    check_finite,
    digest,
    is_finite,
    layout_of,
    store,
    store_transposed,
)
from adapter_loader.refusals import invalid
from adapter_loader.weights_file import read_tensor
from pipeline.adapter_layout import MAX_RANK, AdapterLayout
from pipeline.messages import Merge


class MergePlan(msgspec.Struct, frozen=True, tag=True):
    """How checkpoints will be merged and packed. placed.nbytes is the size of the extent."""

    dtype: str
    ranks: bytes  # int16[layers, modules]
    placed: AdapterLayout
    parts: tuple[Modules, ...]  # as in the merge
    merge: Merge


def plan_merge(parts: tuple[Modules, ...], merge: Merge, base: BaseModel) -> MergePlan:
    """Where everything will lie. Raises RequestError when the ranks do not go together."""
    ranks_of: dict[tuple[int, int], list[int]] = {}
    for modules in parts:
        for place, one in modules.items():
            ranks_of.setdefault(place, []).append(one.rank)
    rank_of = {place: _merged_rank(place, ranks, merge) for place, ranks in ranks_of.items()}
    ranks, placed = layout_of(rank_of, base)
    return MergePlan(base.dtype, ranks, placed, parts, merge)


def pack_merge(descriptors: Sequence[int], plan: MergePlan, extent: memoryview) -> str:
    """As packing.pack, for one open file per part; computes in fp32."""
    dtype = DTYPES[plan.dtype]
    for place in sorted({place for modules in plan.parts for place in modules}):
        name = module_name(*place)
        terms = [
            _read_term(descriptors[part], part, modules[place])
            for part, modules in enumerate(plan.parts)
            if place in modules
        ]
        a, b = merge_module(terms, plan.merge, name)
        placement = plan.placed.at(*place)
        stored = (
            store(a, extent, placement.a_offset, dtype),
            store_transposed(b, extent, placement.b_offset, dtype),
        )
        if not all(map(is_finite, stored)):
            raise invalid(f"module {name} of the merge has values too large for {plan.dtype}")
    return digest(plan.ranks, extent)


def _merged_rank(place: tuple[int, int], ranks: list[int], merge: Merge) -> int:
    name = module_name(*place)
    if not merge.strategy.needs_one_rank:
        if sum(ranks) > MAX_RANK:
            raise invalid(f"module {name} would have rank {sum(ranks)}, and {MAX_RANK} is the most")
        return sum(ranks)
    if len(set(ranks)) > 1:
        raise invalid(
            f"its parts have the ranks {', '.join(map(str, ranks))} in module {name}, "
            f"and {merge.strategy} merges equal ranks only (cat merges any)"
        )
    return ranks[0]


def _read_term(descriptor: int, part: int, module: LoraModule) -> Term:
    matrices = []
    for entry in (module.a, module.b):
        matrix = read_tensor(descriptor, entry)
        check_finite(entry, matrix, matrix, entry.dtype)
        matrices.append(matrix.float())
    return Term(part, matrices[0], matrices[1], module.scaling)
