"""Which tokens are green, and what becomes of them."""

import math

import pytest
import torch

from examples.detect_watermark import is_green as is_green_by_hand
from examples.detect_watermark import z_score
from gpu_worker.sampling import sample
from gpu_worker.watermark import Watermark, is_green, watermarked
from pipeline.messages import Sampling
from tests.gpu_worker.sampling_params import sampled_rows

VOCABULARY = 5000


@pytest.mark.parametrize(
    "mark", [Watermark(), Watermark(0.25, 1.0, (1 << 32) - 1), Watermark(key=0)]
)
def test_a_detector_without_the_server_says_the_same(mark: Watermark) -> None:
    previous = torch.tensor([0, 7, 151_000])
    green = is_green(previous, VOCABULARY, mark)
    for row, last in enumerate(previous.tolist()):
        by_hand = [is_green_by_hand(last, one, mark.key, mark.gamma) for one in range(VOCABULARY)]
        assert green[row].tolist() == by_hand


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5, 0.9])
def test_as_many_tokens_are_green_as_there_should_be_and_no_two_parts_are_alike(
    gamma: float,
) -> None:
    """Within five standard deviations of what chance gives, for tokens that follow each other."""
    green = is_green(torch.arange(100), VOCABULARY, Watermark(gamma)).double()
    shares = green.mean(1)
    deviation = math.sqrt(gamma * (1 - gamma) / VOCABULARY)
    assert (shares - gamma).abs().max() < 5 * deviation
    centred = (green - gamma) / math.sqrt(gamma * (1 - gamma))
    correlations = (centred @ centred.T / VOCABULARY).fill_diagonal_(0)
    assert correlations.abs().max() < 5.5 / math.sqrt(VOCABULARY)
    other_key = is_green(torch.arange(100), VOCABULARY, Watermark(gamma, key=1)).double()
    across = ((other_key - gamma) * (green - gamma)).mean() / (gamma * (1 - gamma))
    assert across.abs() < 5 / math.sqrt(100 * VOCABULARY)


def test_green_tokens_get_the_bonus_and_what_is_forbidden_stays_so() -> None:
    scores = torch.zeros(1, 50)
    scores[0, 3] = -math.inf
    mark = Watermark(delta=1.5)
    green = is_green(torch.tensor([9]), 50, mark)
    marked = watermarked(scores, torch.tensor([9]), mark)
    assert marked[0, 3] == -math.inf
    others = torch.arange(50) != 3
    assert torch.equal(marked[0, others], torch.where(green, 1.5, 0.0)[0, others])


def test_a_row_is_marked_after_its_last_token_and_its_neighbours_are_not() -> None:
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(1)) * 0.1
    greedy, marked = Sampling(temperature=0.0), Sampling(temperature=0.0, watermark=True)
    histories = [[1, 2], [3, 4, 5], [6]]
    tokens, _ = sample(logits, sampled_rows([greedy, marked, greedy], histories=histories))
    alone = logits.argmax(-1)
    assert tokens[0] == alone[0]
    assert tokens[2] == alone[2]
    green = is_green(torch.tensor([5]), 400, Watermark())[0]
    assert tokens[1] == torch.where(green, logits[1], -math.inf).argmax()


def test_the_log_probabilities_of_a_marked_row_are_the_models() -> None:
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(2))
    rows = sampled_rows([Sampling(temperature=0.0, watermark=True)])
    tokens, logprobs = sample(logits, rows._replace(logprobs=rows.logprobs | True))
    assert logprobs is not None
    own = logprobs[0, :1].view(torch.float32)
    assert own.item() == pytest.approx(logits.log_softmax(-1)[0, tokens[0]].item(), abs=1e-5)


def test_what_is_drawn_with_a_watermark_is_found_and_what_is_not_is_not() -> None:
    def drawn(watermark: bool) -> list[int]:
        generator = torch.Generator().manual_seed(3)
        ids = [1]
        for _ in range(150):
            logits = torch.randn(1, VOCABULARY, generator=generator)
            sampling = Sampling(temperature=1.0, seed=4, watermark=watermark)
            tokens, _ = sample(logits, sampled_rows([sampling], histories=[ids]))
            ids.append(int(tokens[0]))
        return ids

    assert z_score(drawn(watermark=True)) > 6
    assert abs(z_score(drawn(watermark=False))) < 4
    assert abs(z_score(drawn(watermark=True), key=1)) < 4
    assert z_score([]) == 0
