"""Log-probabilities against transformers, of what is produced and of prompts, in any chunks."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.logprobs import PIECE_TOKENS, logprob_rows
from gpu_worker.worker import Worker
from pipeline.logprobs import unpack
from pipeline.messages import Logprobs, Sampling
from tests.gpu_worker.driving import Driver, Row, prompt

TOP = 4
Given = list[tuple[float, list[tuple[int, float]]]]


def expected(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """[i] is what the first i + 1 tokens say of the next."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def check(given: Given, oracle: Tensor, tokens: list[int], top: int) -> None:
    """given[i] is of tokens[i], and oracle[i] what comes before it says."""
    assert len(given) == len(tokens)
    for (logprob, likeliest), of_all, token in zip(given, oracle, tokens, strict=True):
        assert logprob == pytest.approx(float(of_all[token]), abs=1e-4)
        values, ids = of_all.topk(top)
        assert [one for one, _ in likeliest] == ids.tolist()
        assert [value for _, value in likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def check_row(row: Row, model: PreTrainedModel) -> None:
    oracle = expected(model, row.tokens)
    at = row.new.prompt_tokens
    wanted = row.new.logprobs
    assert wanted is not None
    check(row.logprobs, oracle[at - 1 : -1], row.produced, wanted.top)
    if wanted.prompt_top is not None:
        check(row.prompt_logprobs, oracle[: at - 1], row.tokens[1:at], wanted.prompt_top)


def test_of_produced_tokens_drawn_or_not(worker: Worker, llama: PreTrainedModel) -> None:
    driver = Driver(worker)
    samplings = [Sampling(temperature=0.0), Sampling(temperature=1.5, seed=3, top_p=0.9)]
    for number, sampling in enumerate(samplings):
        driver.add(number, prompt(number, 9), sampling=sampling, logprobs=Logprobs(TOP - number))
    driver.add(2, prompt(2, 9))
    driver.generate([0, 2, 1], 6)
    for number in range(2):
        check_row(driver.rows[number], llama)
    assert driver.rows[2].logprobs == []


@pytest.mark.parametrize("chunks", [[21], [1] * 21, [4, 9, 8], [20, 1]])
def test_of_a_prompt_in_any_chunks(
    worker: Worker, llama: PreTrainedModel, chunks: list[int]
) -> None:
    driver = Driver(worker)
    driver.add(3, prompt(4, 21), logprobs=Logprobs(0, prompt_top=TOP))
    driver.add(1, prompt(5, 6), slot=1)  # whose adapter puts it elsewhere in the batch
    driver.prefill_all([1])
    for chunk in chunks:
        driver.step(decode=[1], prefill=[(3, chunk)])
    check_row(driver.rows[3], llama)


def test_of_several_prompts_and_replies_in_one_step(worker: Worker, llama: PreTrainedModel) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, 11), logprobs=Logprobs(2, prompt_top=0))
    driver.add(1, prompt(2, 7), logprobs=Logprobs(1))
    driver.add(2, prompt(3, 13), slot=0)
    driver.add(3, prompt(4, 15), logprobs=Logprobs(0, prompt_top=3))
    driver.add(4, prompt(5, 1), logprobs=Logprobs(0, prompt_top=1))
    driver.step(prefill=[(3, 8), (1, 7)])
    driver.step(decode=[1], prefill=[(2, 13), (3, 7), (4, 1), (0, 11)])
    for row in (0, 1, 3, 4):
        check_row(driver.rows[row], llama)
    assert driver.rows[4].prompt_logprobs == []


def test_after_a_restart_only_the_prompt_is_scored(worker: Worker, llama: PreTrainedModel) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, 6), logprobs=Logprobs())
    driver.generate([0], 4)
    known = driver.free(0).tokens
    row = driver.add(0, known, prompt_tokens=6, logprobs=Logprobs(prompt_top=0))
    driver.prefill_all([0])
    oracle = expected(llama, known)
    check(row.prompt_logprobs, oracle[:5], known[1:6], 0)


def test_with_an_adapter_they_are_the_adapters(worker: Worker, peft_llama: PreTrainedModel) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, 12), slot=1, logprobs=Logprobs(2, prompt_top=2))
    driver.generate([0], 3)
    peft_llama.set_adapter("query_value")
    check_row(driver.rows[0], peft_llama)


def test_a_long_prompt_is_scored_piece_by_piece(worker: Worker, llama: PreTrainedModel) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(1, PIECE_TOKENS + 30), logprobs=Logprobs(prompt_top=1))
    driver.prefill_all([0])
    check_row(driver.rows[0], llama)


def test_a_vocabulary_that_is_smaller_than_what_is_wanted_comes_whole() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    [row] = logprob_rows(logits, torch.tensor([2]), 20)
    logprob, likeliest = unpack(row.numpy().tobytes(), 20)
    of_all = logits.log_softmax(-1)[0].tolist()
    assert logprob == pytest.approx(of_all[2])
    assert [token for token, _ in likeliest] == [1, 2, 0]


def test_logits_in_half_precision_give_them_in_full() -> None:
    logits = torch.randn(3, 500).to(torch.bfloat16)
    tokens = logits.argmax(-1)
    got = logprob_rows(logits, tokens, 0).view(torch.float32)[:, 0]
    want = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
