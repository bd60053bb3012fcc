"""Searching the cumulative sums of wide rows without computing all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
BELOW_ONE = 1 - 2.0**-52


def first_beyond(weights: Tensor, share: Tensor) -> Tensor:
    """Where the cumulative sum of a row first exceeds this share of its total.

    Finds the block by the sums of blocks, and then the place in it. An element of weight 0 is never
    found; a row whose total is not finite or 0 gives any index.

    weights  fp32[n, width], none negative
    share    fp64[n, 1], in [0, 1)
    returns  int64[n, 1]
    """
    width = weights.shape[1]
    blocks = F.pad(weights, (0, -width % BLOCK)).view(len(weights), -1, BLOCK)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    target = share * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    of_block = sums.gather(1, block)
    inside = (target - (cumulative.gather(1, block) - of_block)) / of_block
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    within = chosen.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(
        within, inside.clamp_(0, BELOW_ONE) * within[:, -1:], right=True
    ).clamp_(max=BLOCK - 1)
    return (block * BLOCK + place).clamp_(max=width - 1)
