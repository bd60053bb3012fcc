"""Sampling parameters as the row table holds them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.rows import SAMPLING
from gpu_worker.sampling import SampledRows
from pipeline.messages import Sampling


def params_of(samplings: Sequence[Sampling]) -> NDArray[np.void]:
    return np.array(
        [tuple(getattr(s, name) for name in SAMPLING.names or ()) for s in samplings], SAMPLING
    )


def sampled_rows(
    samplings: Sequence[Sampling],
    *,
    histories: Sequence[Sequence[int]] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    logprobs: Sequence[bool] | None = None,
    top: int = 0,
) -> SampledRows:
    """Rows with these histories, [1] by default, all of it prompt by default."""
    histories = histories or [[1]] * len(samplings)
    table = np.full((len(samplings), max(map(len, histories)) + 3), 2, np.int32)
    for row, tokens in enumerate(histories):
        table[row, : len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in histories])
    return SampledRows(
        params=params_of(samplings),
        rows=np.arange(len(samplings)),
        history=torch.from_numpy(table),
        lengths=lengths,
        prompt_tokens=lengths if prompt_tokens is None else np.array(prompt_tokens),
        logprobs=np.array(logprobs or [False] * len(samplings)),
        top=top,
    )
