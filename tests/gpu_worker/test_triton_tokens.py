"""Tokens on the device against their formulas, with padding rows."""

import pytest
import torch
from torch import Tensor

from gpu_worker.kernels.triton_tokens import GREEDY_BLOCK, embed, greedy
from tests.gpu_worker.triton_device import DEVICE

INF, NAN = float("inf"), float("nan")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [16, 1100])
def test_embed_takes_the_token_of_each_row_and_position(hidden: int, dtype: torch.dtype) -> None:
    embedding = torch.randn((50, hidden), device=DEVICE).to(dtype)
    history = torch.randint(50, (4, 9), dtype=torch.int32, device=DEVICE)
    out = torch.full((5, hidden), NAN, device=DEVICE).to(dtype)
    embed(history, ints(3, -1, 0, 3, -1), ints(8, 0, 0, 2, 12345), embedding, out)
    expected = torch.zeros_like(out)
    for index, row, position in ((0, 3, 8), (2, 0, 0), (3, 3, 2)):
        expected[index] = embedding[int(history[row, position])]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def chosen(logits: Tensor, rows: Tensor | None = None) -> tuple[list[int], Tensor]:
    """What greedy gives, and the history it leaves; row i is n - 1 - i, its length i + 1."""
    n = len(logits)
    rows = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=DEVICE) if rows is None else rows
    lengths = torch.arange(1, n + 1, dtype=torch.int32, device=DEVICE)
    history = torch.full((n, n + 2), 77, dtype=torch.int32, device=DEVICE)
    out = torch.full((n,), 99, dtype=torch.int32, device=DEVICE)
    greedy(logits, rows, lengths, history, out)
    return out.tolist(), history


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, GREEDY_BLOCK, GREEDY_BLOCK + 1, 3 * GREEDY_BLOCK - 7])
def test_greedy_is_argmax(vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.randn((3, vocabulary + 3), device=DEVICE).to(dtype)[:, :vocabulary]
    tokens, history = chosen(logits)
    assert tokens == logits.argmax(-1).tolist()
    expected = torch.full_like(history, 77)
    for index, token in enumerate(tokens):
        expected[2 - index, index + 1] = token
    assert torch.equal(history, expected)


def test_the_lowest_of_equals_wins_within_and_between_parts() -> None:
    logits = torch.zeros((3, 4 * GREEDY_BLOCK), device=DEVICE)
    logits[1, 3 * GREEDY_BLOCK + 5] = 1
    logits[1, GREEDY_BLOCK + 9] = 1
    logits[1, GREEDY_BLOCK + 8] = 1
    logits[2, 17:] = 2
    assert chosen(logits)[0] == [0, GREEDY_BLOCK + 8, 17]


@pytest.mark.parametrize("at", [0, 6, 2 * GREEDY_BLOCK - 1])
@pytest.mark.parametrize(("value", "token"), [(INF, -1), (NAN, -1), (-INF, 5)])
def test_nan_and_infinity_give_minus_one(at: int, value: float, token: int) -> None:
    logits = torch.zeros((2, 2 * GREEDY_BLOCK), device=DEVICE)
    logits[:, 5] = 1
    logits[1, at] = value
    tokens, history = chosen(logits)
    assert tokens == [5, token]
    assert history[0, 2] == max(token, 0)


def test_a_row_of_nothing_but_minus_infinity_gives_minus_one() -> None:
    assert chosen(torch.full((2, 100), -INF, device=DEVICE))[0] == [-1, -1]


def test_padding_writes_no_history() -> None:
    logits = torch.zeros((3, 100), device=DEVICE)
    tokens, history = chosen(logits, ints(-1, 1, -1))
    assert tokens == [-1, 0, -1]
    assert history.eq(77).sum() == history.numel() - 1
    assert history[1, 2] == 0
