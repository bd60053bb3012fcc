"""Adapters merged into one: the published formulas, on A and on B for themselves.

Task arithmetic (Ilharco et al., arXiv:2212.04089), TIES (Yadav et al., arXiv:2306.01708) and DARE
(Yu et al., arXiv:2311.03099) are written for whole weights T_i. Here they act on the A of all
adapters and on their B, as in PEFT's add_weighted_adapter, so that the result has a low rank
again. With u_i = weight_i * scaling_i, an A is weighted by sign(u_i) sqrt|u_i| and a B by
sqrt|u_i|, so that an adapter alone is scaled by u_i.

linear        sum of w_i T_i
ties          each T_i keeps its largest values by magnitude (density of them); each element elects
              a sign, plus where there is a draw; the mean of w_i T_i over those of that sign
dare_linear   each value is kept with probability density and divided by it, then linear
dare_ties     the same, then elected and averaged as by ties
cat           A_i one above the other, u_i B_i side by side: exactly the sum of u_i B_i A_i
"""

import hashlib
import math
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from pipeline.messages import MajoritySign, Merge, MergeStrategy


class Term(msgspec.Struct, frozen=True):
    """What one part has for a module."""

    part: int  # its index in the merge
    a: Tensor  # [rank, in] fp32
    b: Tensor  # [out, rank] fp32, not scaled
    scaling: float


def merge_module(terms: Sequence[Term], merge: Merge, name: str) -> tuple[Tensor, Tensor]:
    """The merged A [rank, in] and B [out, rank] of one module, fp32, to be used unscaled.

    terms  of the parts that have the module, at least one; of one rank, unless for `cat`
    name   of the module: each draws its own lots
    """
    scales = [merge.parts[term.part].weight * term.scaling for term in terms]
    if merge.strategy == MergeStrategy.CAT:
        scaled = [term.b * scale for term, scale in zip(terms, scales, strict=True)]
        return torch.cat([term.a for term in terms]), torch.cat(scaled, dim=1)
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    a = _merge_matrices(
        _prune([term.a for term in terms], terms, merge, f"{name}.A"), signed, merge
    )
    b = _merge_matrices(_prune([term.b for term in terms], terms, merge, f"{name}.B"), roots, merge)
    return a, b


def keep_largest(matrix: Tensor, density: float) -> Tensor:
    """Zero all but the int(density * n) values that are largest by magnitude."""
    kept = int(density * matrix.numel())
    indices = matrix.abs().flatten().topk(kept).indices
    pruned = torch.zeros_like(matrix).flatten()
    pruned[indices] = matrix.flatten()[indices]
    return pruned.view(matrix.shape)


def drop_at_random(matrix: Tensor, density: float, seed: int) -> Tensor:
    """Keep each value with probability density, divided by it: the expectation stays."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.bernoulli(torch.full_like(matrix, density), generator=generator)
    return matrix * kept / density


def seed_of(merge: Merge, part: int, matrix: str) -> int:
    """Of the lots for one matrix of one part, whatever else is merged, and in which order."""
    text = f"{merge.seed} {part} {matrix}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def average_by_sign(matrices: Tensor, weights: Tensor, majority_sign: MajoritySign) -> Tensor:
    """TIES' election and disjoint mean.

    matrices  [parts, rows, columns]
    weights   [parts, 1, 1]; they do not vote
    """
    votes = matrices if majority_sign == MajoritySign.TOTAL else matrices.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = matrices.sign() == elected
    return (matrices * weights * agree).sum(0) / agree.sum(0).clamp(min=1)


def _prune(matrices: list[Tensor], terms: Sequence[Term], merge: Merge, name: str) -> list[Tensor]:
    if merge.density == 1 or not merge.strategy.prunes:
        return matrices
    if merge.strategy.drops_at_random:
        return [
            drop_at_random(matrix, merge.density, seed_of(merge, term.part, name))
            for matrix, term in zip(matrices, terms, strict=True)
        ]
    return [keep_largest(matrix, merge.density) for matrix in matrices]


def _merge_matrices(matrices: list[Tensor], weights: list[float], merge: Merge) -> Tensor:
    stacked, by_part = torch.stack(matrices), torch.tensor(weights)[:, None, None]
    if merge.strategy.elects_signs:
        return average_by_sign(stacked, by_part, merge.majority_sign)
    return (stacked * by_part).sum(0)
