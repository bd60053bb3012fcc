"""A watermark in what is sampled: Kirchenbauer et al., arXiv:2301.10226, the soft kind.

The token before a place divides the vocabulary in two, and the green part gets a bonus. Who knows
the key can count green tokens in a text, as examples/detect_watermark.py does. LoRAX shuffles the
vocabulary with the random numbers of its device; here a hash says of each token whether it is
green, which is the same everywhere and needs no table.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WORD = (1 << 32) - 1
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97  # below 2**31: no product of a word leaves int64


class Watermark(NamedTuple):
    gamma: float = 0.5  # share of the vocabulary that is green
    delta: float = 2.0  # what is added to the logits of green tokens
    key: int = 15485863  # below 2**32


USUAL = Watermark()


def watermarked(scores: Tensor, previous: Tensor, watermark: Watermark) -> Tensor:
    """Scores with the bonus.

    scores    fp32[n, vocabulary]
    previous  int64[n], the last token of each row
    """
    green = is_green(previous, scores.shape[-1], watermark)
    return torch.where(green, scores + watermark.delta, scores)


def is_green(previous: Tensor, vocabulary: int, watermark: Watermark) -> Tensor:
    """bool[n, vocabulary]"""
    state = _mix(previous ^ watermark.key)[:, None]
    tokens = torch.arange(vocabulary, device=previous.device)
    mixed = _mix((_mix(tokens ^ state) + state) & WORD)
    return mixed < int(watermark.gamma * (WORD + 1))


def _mix(x: Tensor) -> Tensor:
    """Of each 32-bit word another, whose bits depend on all of its; found by hash-prospector."""
    x = ((x ^ (x >> 16)) * FIRST) & WORD
    x = ((x ^ (x >> 15)) * SECOND) & WORD
    return x ^ (x >> 15)
