"""Choosing the next token of each row, vectorised over rows.

In the order of LoRAX and Hugging Face: bias, watermark, repetition penalty, frequency and presence
penalty, temperature, top_k, top_p, typical_p, min_p, draw. What a row gets does not depend on the
others of its batch: its logits are its own, its random number comes from its seed and position.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.biases import StepBiases, biased
from gpu_worker.cumulative import first_beyond
from gpu_worker.device import to_device
from gpu_worker.filters import filter_
from gpu_worker.logprobs import logprob_rows
from gpu_worker.randomness import uniform
from gpu_worker.watermark import USUAL, Watermark, watermarked
from pipeline.messages import NOT_FINITE


class SampledRows(NamedTuple):
    """The rows of a step that get a token, in order. Only `history` lies on the device."""

    params: NDArray[np.void]  # rows.SAMPLING[sampled]
    rows: NDArray[np.int64]  # [sampled], into history
    history: Tensor  # int32[all rows, tokens]: prompt, then output
    lengths: NDArray[np.int64]  # [sampled], tokens in history
    prompt_tokens: NDArray[np.int64]  # [sampled], the first of them
    logprobs: NDArray[np.bool_]  # [sampled], who wants them
    top: int = 0  # log-probabilities of the likeliest tokens, besides the chosen one's
    biases: StepBiases | None = None
    watermark: Watermark = USUAL  # of the rows that want one


def sample(
    logits: Tensor, rows: SampledRows, masked: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose a token for each row, without waiting for the device.

    logits   [sampled, vocabulary], compute dtype; not changed
    masked   the same with -inf for what must not be chosen, if there is such
    returns  tokens int64[sampled], -1 where the logits are not finite; and rows of
             pipeline.logprobs for those that want them, or None when nobody does
    """
    params = rows.params
    penalised = (
        (params["repetition_penalty"] != 1)
        | (params["frequency_penalty"] != 0)
        | (params["presence_penalty"] != 0)
    )
    scores = logits if masked is None else masked
    if rows.biases is not None:
        scores = biased(scores, rows.biases)
    marked = np.flatnonzero(params["watermark"])
    if len(marked):
        scores = scores.float()
        at = to_device(marked, logits.device)
        scores = scores.index_copy(0, at, mark(scores[at], _only(rows, marked)))
    if penalised.any():
        scores = scores.float()
        indices = np.flatnonzero(penalised)
        at = to_device(indices, logits.device)
        scores = scores.index_copy(0, at, penalise(scores[at], _only(rows, indices)))
    largest, tokens = scores.max(-1)  # NaN and infinity are what it finds first
    finite = largest.isfinite()
    drawn = np.flatnonzero(params["temperature"] > 0)
    if len(drawn):
        at = to_device(drawn, logits.device)
        tokens.index_copy_(0, at, draw(scores[at].float(), _only(rows, drawn)))
    tokens = tokens.where(finite, NOT_FINITE)
    if not rows.logprobs.any():
        return tokens, None
    at = to_device(np.flatnonzero(rows.logprobs), logits.device)
    return tokens, logprob_rows(logits[at], tokens[at], rows.top)


def mark(scores: Tensor, rows: SampledRows) -> Tensor:
    """Give these rows, fp32[n, vocabulary], their watermark."""
    device = scores.device
    last = to_device(rows.lengths - 1, device)
    previous = rows.history[to_device(rows.rows, device), last].long()
    return watermarked(scores, previous, rows.watermark)


def penalise(scores: Tensor, rows: SampledRows) -> Tensor:
    """Apply the penalties for what rows have said already.

    Repetition counts prompt and output, and divides or multiplies away from likely (CTRL,
    arXiv:1909.05858); frequency and presence count the output alone, as OpenAI's do.

    scores   fp32[n, vocabulary]
    returns  the same shape, the caller's
    """
    device = scores.device
    columns = np.arange(rows.lengths.max())
    known = columns[None, :] < rows.lengths[:, None]
    output = known & (columns[None, :] >= rows.prompt_tokens[:, None])
    history = rows.history[to_device(rows.rows, device), : len(columns)].long()
    ids = history.where(to_device(known, device), history[:, :1])
    counts = torch.zeros_like(scores)
    counts.scatter_add_(1, ids, to_device(output.astype(np.float32), device))
    count = counts.gather(1, ids)
    repetition = _column(rows.params["repetition_penalty"], device)
    score = scores.gather(1, ids)
    score = torch.where(score < 0, score * repetition, score / repetition)
    score -= _column(rows.params["frequency_penalty"], device) * count
    score -= _column(rows.params["presence_penalty"], device) * (count > 0)
    return scores.scatter(1, ids, score)  # the same id always gets the same score


def draw(scores: Tensor, rows: SampledRows) -> Tensor:
    """Draw from the filtered distribution, by inverting its cumulative sum in vocabulary order.

    scores   fp32[n, vocabulary], changed
    returns  int64[n]
    """
    device = scores.device
    scores /= _column(rows.params["temperature"], device)
    filter_(scores, rows.params)
    scores -= scores.amax(-1, keepdim=True)
    numbers = to_device(uniform(rows.params["seed"], rows.lengths), device)
    return first_beyond(scores.exp_(), numbers[:, None])[:, 0]


def _only(rows: SampledRows, indices: NDArray[np.int64]) -> SampledRows:
    return SampledRows(
        params=rows.params[indices],
        rows=rows.rows[indices],
        history=rows.history,
        lengths=rows.lengths[indices],
        prompt_tokens=rows.prompt_tokens[indices],
        logprobs=rows.logprobs[indices],
        watermark=rows.watermark,
    )


def _column(values: NDArray[np.float32], device: torch.device) -> Tensor:
    return to_device(values[:, None].copy(), device)
