"""Top-k, top-p, typical-p and min-p over rows of logits; each row has its own numbers.

All but typical-p keep what lies at or above a threshold, so ties are kept or dropped together, and
a row's result cannot depend on how anything was sorted. The threshold of top-p is looked for among
the CANDIDATES largest logits, and only rows whose nucleus is wider are sorted in full.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CANDIDATES = 256
DROPPED = float("-inf")
Keep = Callable[[Tensor, Tensor], Tensor]  # scores, the rows' numbers -> bool


def filter_(scores: Tensor, params: NDArray[np.void]) -> None:
    """Set what the filters drop to -inf, in place; at least one token of a row stays.

    scores  fp32[n, vocabulary], temperature applied
    params  rows.SAMPLING[n]
    """
    vocabulary = scores.shape[1]
    top_k = params["top_k"]
    _apply(scores, (top_k > 0) & (top_k < vocabulary), top_k, keep_top_k)
    _apply(scores, params["top_p"] < 1, params["top_p"], keep_top_p)
    _apply(scores, params["typical_p"] < 1, params["typical_p"], keep_typical)
    _apply(scores, params["min_p"] > 0, params["min_p"], keep_min_p)


def _apply(scores: Tensor, chosen: NDArray[np.bool_], values: NDArray[Any], keep: Keep) -> None:
    indices = np.flatnonzero(chosen)
    if len(indices) == 0:
        return
    of_rows = torch.from_numpy(values[indices][:, None]).to(scores.device)
    if len(indices) == len(chosen):
        scores.masked_fill_(~keep(scores, of_rows), DROPPED)
        return
    at = torch.from_numpy(indices).to(scores.device)
    rows = scores[at]
    scores.index_copy_(0, at, rows.masked_fill_(~keep(rows, of_rows), DROPPED))


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """The k largest, with all that tie with the last. k is int64[n, 1]."""
    largest = scores.topk(int(k.max())).values
    return scores >= largest.gather(1, k - 1)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """The smallest set of the likeliest whose probabilities reach p, with all that tie with its
    last (Holtzman et al., arXiv:1904.09751). p is fp32[n, 1]."""
    total = scores.logsumexp(-1, keepdim=True)
    largest = scores.topk(min(CANDIDATES, scores.shape[1])).values
    threshold, found = _nucleus_end(largest, total, p)
    wide = (~found[:, 0]).nonzero()[:, 0]
    if len(wide) and largest.shape[1] < scores.shape[1]:
        ordered = scores[wide].sort(dim=-1, descending=True).values
        threshold[wide] = _nucleus_end(ordered, total[wide], p[wide])[0]
    return scores >= threshold


def _nucleus_end(ordered: Tensor, total: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest logit of the nucleus [n, 1], and whether the nucleus ends within `ordered`."""
    reached = (ordered - total).exp_().cumsum(-1, dtype=torch.float64)
    before = (reached[:, :-1] < p).sum(-1, keepdim=True)  # tokens after which p is not reached
    return ordered.gather(1, before), reached[:, -1:] >= p


def keep_typical(scores: Tensor, mass: Tensor) -> Tensor:
    """The smallest set of those whose surprise is nearest to the entropy, whose probabilities
    reach the mass (locally typical sampling, arXiv:2202.00666). mass is fp32[n, 1]."""
    logs = scores.log_softmax(-1)
    probabilities = logs.exp()
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1, keepdim=True)
    distance = (-logs - entropy).abs_()
    ordered, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(-1, dtype=torch.float64)
    last = (reached[:, :-1] < mass).sum(-1, keepdim=True)
    return distance <= ordered.gather(1, last)


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Those at least p times as likely as the likeliest. p is fp32[n, 1]."""
    return scores >= scores.amax(-1, keepdim=True) + p.log()
