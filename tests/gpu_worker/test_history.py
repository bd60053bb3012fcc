"""The tokens of all rows."""

import numpy as np
import torch

from gpu_worker.history import History


def make_history() -> History:
    history = History(rows=3, row_tokens=6, device=torch.device("cpu"))
    for row in (1, 2):
        history.write(row, np.array([5, 6, 7], np.int32))
    return history


def test_what_was_written_is_read() -> None:
    read = make_history().read(torch.tensor([2, 1, 0]), torch.tensor([2, 0, 0]))
    assert (read.tolist(), read.dtype) == ([7, 5, 0], torch.int64)


def test_produced_tokens_follow_the_others() -> None:
    history = make_history()
    history.append(torch.tensor([2, 1]), torch.tensor([3, 3]), torch.tensor([20, -1]))
    assert history.tokens[1, :4].tolist() == [5, 6, 7, 0]
    assert history.tokens[2, :4].tolist() == [5, 6, 7, 20]


def test_padding_reads_and_writes_the_row_of_nobody() -> None:
    history = make_history()
    history.append(torch.tensor([history.nobody]), torch.tensor([0]), torch.tensor([9]))
    assert not history.tokens[0].any()
