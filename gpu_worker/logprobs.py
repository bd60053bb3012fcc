"""Log-probabilities of tokens under the model itself, for those rows that want them.

The log softmax of the model's own logits, before bias, penalties, temperature and filters. What is
made here are the rows of pipeline.logprobs, on the device.
"""

import torch
from torch import Tensor

from gpu_worker.history import History
from gpu_worker.layers.linear import Linear

PIECE_TOKENS = 128  # of a prompt, whose logits are in memory at the same time


def logprob_rows(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    """Of one token for each row of logits, and of the `top` likeliest.

    logits   [n, vocabulary], compute dtype; not changed
    tokens   int64[n]; -1 where the logits are not finite, which gives a row of no meaning
    returns  int32[n, 1 + 2 * top], less where the vocabulary is smaller
    """
    exact = logits.float()
    total = exact.logsumexp(-1, keepdim=True)
    own = exact.gather(1, tokens.clamp(min=0)[:, None]) - total
    if top == 0:
        return own.view(torch.int32)
    values, ids = exact.topk(min(top, exact.shape[1]), -1)
    return torch.cat((own.view(torch.int32), ids.int(), (values - total).view(torch.int32)), -1)


class PromptScores:
    """The log-probabilities of the tokens that follow some of a step's, which are fed.

    A prompt may have more logits than there is memory, so that they are made piece by piece.

    scored     int64[n], indices of the step's tokens
    rows       int64[n], of these
    positions  int64[n], of what follows each
    """

    def __init__(
        self, *, scored: Tensor, rows: Tensor, positions: Tensor, history: History, top: int
    ) -> None:
        self._scored = scored
        self._following = history.read(rows, positions)
        self._top = top
        self.rows: Tensor | None = None  # int32[n, ...] of pipeline.logprobs, once taken

    def take(self, hidden: Tensor, lm_head: Linear) -> None:
        """[tokens, hidden] of the step, and what makes logits of it."""
        pieces = []
        for start in range(0, len(self._scored), PIECE_TOKENS):
            piece = slice(start, start + PIECE_TOKENS)
            logits = lm_head(hidden.index_select(0, self._scored[piece]))
            pieces.append(logprob_rows(logits, self._following[piece], self._top))
        self.rows = torch.cat(pieces)
