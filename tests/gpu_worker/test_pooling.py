"""Embeddings against transformers and PEFT, in any chunks and whoever shares the step."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from gpu_worker.batch import PooledChunk
from gpu_worker.layers.linear import make_linear
from gpu_worker.pooling import Means, StepEmbeddings
from gpu_worker.worker import Worker
from pipeline.messages import Pooling, PoolingKind, StepDone
from tests.gpu_worker.driving import Driver, prompt

LAST, MEAN = Pooling(), Pooling(PoolingKind.MEAN)
RAW_MEAN = Pooling(PoolingKind.MEAN, normalize=False)
RAW_LAST = Pooling(PoolingKind.LAST, normalize=False)
EVERY = [LAST, MEAN, RAW_LAST, RAW_MEAN]


@pytest.fixture(scope="session")
def llama_body(llama_folder: Path) -> PreTrainedModel:
    """The llama without its LM head."""
    model: PreTrainedModel = AutoModel.from_pretrained(
        llama_folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model


def expected(states: Tensor, pooling: Pooling) -> Tensor:
    """states  [tokens, hidden] after the final norm"""
    pooled = states[-1] if pooling.kind is PoolingKind.LAST else states.mean(0)
    return F.normalize(pooled, dim=-1) if pooling.normalize else pooled


@torch.no_grad()
def of_body(body: PreTrainedModel, tokens: Sequence[int], pooling: Pooling) -> Tensor:
    states: Tensor = body(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0]
    return expected(states, pooling)


@torch.no_grad()
def of_adapter(model: PeftModel, name: str, tokens: Sequence[int], pooling: Pooling) -> Tensor:
    model.set_adapter(name)
    given = model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True)
    return expected(given.hidden_states[-1][0], pooling)


def embeddings(done: StepDone, count: int) -> Tensor:
    """[count, hidden]"""
    if count == 0:
        assert done.embeddings == b""
        return torch.empty(0, 0)
    return torch.from_numpy(np.frombuffer(done.embeddings, np.float32).copy()).view(count, -1)


def check(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", EVERY)
@pytest.mark.parametrize("chunks", [[21], [1] * 21, [4, 9, 8], [20, 1]])
def test_in_any_chunks(
    worker: Worker, llama_body: PreTrainedModel, chunks: list[int], pooling: Pooling
) -> None:
    driver = Driver(worker)
    tokens = prompt(4, 21)
    driver.add(3, tokens, pooling=pooling)
    driver.add(1, prompt(5, 6), slot=1)  # whose adapter puts it elsewhere in the batch
    driver.prefill_all([1])
    steps = [driver.step(decode=[1], prefill=[(3, chunk)]) for chunk in chunks]
    assert all(step.done.embeddings == b"" for step in steps[:-1])
    assert all(step.tokens.keys() == {1} for step in steps)
    [given] = embeddings(steps[-1].done, 1)
    check(given, of_body(llama_body, tokens, pooling))


def test_of_several_adapters_in_one_step(
    worker: Worker, llama_body: PreTrainedModel, peft_llama: PeftModel
) -> None:
    """In the order of the step, wherever adapters put them in the batch."""
    driver = Driver(worker)
    lengths = {0: 11, 1: 7, 2: 13, 3: 15, 4: 1}
    slots = {0: -1, 1: 1, 2: 0, 3: -1, 4: 1}
    names = {0: "all_linear", 1: "query_value"}
    kinds = {0: MEAN, 1: LAST, 2: RAW_MEAN, 4: RAW_LAST}
    tokens = {row: prompt(row, length) for row, length in lengths.items()}
    for row in lengths:
        driver.add(row, tokens[row], slot=slots[row], pooling=kinds.get(row))
    driver.step(prefill=[(2, 6)])
    done = driver.step(prefill=[(2, 7), (4, 1), (3, 15), (0, 11), (1, 7)])
    assert done.tokens.keys() == {3}
    for one, row in zip(embeddings(done.done, 4), (2, 4, 0, 1), strict=True):
        if slots[row] < 0:
            check(one, of_body(llama_body, tokens[row], kinds[row]))
        else:
            check(one, of_adapter(peft_llama, names[slots[row]], tokens[row], kinds[row]))


def test_the_last_state_after_a_cached_prefix_is_the_same(
    worker: Worker, llama_body: PreTrainedModel
) -> None:
    driver = Driver(worker)
    tokens = prompt(2, 14)
    driver.add(0, tokens[:8])
    driver.prefill_all([0])
    driver.add(1, tokens, pooling=LAST, cached_blocks=driver.rows[0].blocks[:2])
    [given] = embeddings(driver.prefill_all([1]).done, 1)
    check(given, of_body(llama_body, tokens, LAST))


def test_a_row_that_is_given_again_begins_with_nothing(
    worker: Worker, llama_body: PreTrainedModel
) -> None:
    """The one before it was preempted when half of its mean was there, and is not embedded."""
    driver = Driver(worker)
    driver.add(0, prompt(1, 12), pooling=MEAN)
    driver.step(prefill=[(0, 5)])
    driver.free(0)
    tokens = prompt(3, 9)
    driver.add(0, tokens, pooling=MEAN)
    [given] = embeddings(driver.prefill_all([0]).done, 1)
    check(given, of_body(llama_body, tokens, MEAN))
    driver.free(0)
    driver.add(0, tokens)
    after = driver.prefill_all([0])
    assert after.done.embeddings == b""
    assert after.tokens.keys() == {0}


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_in_any_schedule(seed: int, worker: Worker, llama_body: PreTrainedModel) -> None:
    """Rows go on at random, in any order and any chunks, beside one that decodes."""
    choose = random.Random(seed)
    driver = Driver(worker)
    poolings: list[Pooling | None] = [*choose.sample(EVERY, 4), None]
    tokens = [prompt(seed + row, choose.randint(1, 20)) for row in range(len(poolings))]
    for row, pooling in enumerate(poolings):
        driver.add(row, tokens[row], pooling=pooling)
    fed = dict.fromkeys(range(len(poolings)), 0)
    while fed:
        rows = choose.sample(sorted(fed), choose.randint(1, len(fed)))
        chunks = [(row, choose.randint(1, len(tokens[row]) - fed[row])) for row in rows]
        done = driver.step(decode=[4] if 4 not in fed else [], prefill=chunks).done
        for row, count in chunks:
            fed[row] += count
        ended = [row for row in rows if fed[row] == len(tokens[row])]
        embedded = [(row, pooling) for row in ended if (pooling := poolings[row]) is not None]
        for one, (row, pooling) in zip(embeddings(done, len(embedded)), embedded, strict=True):
            check(one, of_body(llama_body, tokens[row], pooling))
        for row in ended:
            del fed[row]
    for row in range(len(poolings)):
        driver.free(row)
    driver.step()


@pytest.mark.parametrize("pooling", EVERY)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_all_nan_and_alone(pooling: Pooling, value: float) -> None:
    hidden = torch.ones(6, 4)
    hidden[2, 1] = value
    chunks = [PooledChunk(0, 0, 3, is_last=True), PooledChunk(1, 3, 3, is_last=True)]
    step = StepEmbeddings(
        chunks, pooling={0: pooling, 1: pooling}, lengths={0: 3, 1: 3}, means=Means()
    )
    step.take(hidden, make_linear(torch.ones(2, 4)))
    assert step.embeddings is not None
    broken, fine = step.embeddings
    assert broken.isnan().all()
    check(fine, expected(hidden[3:], pooling))


def test_a_mean_is_summed_in_full_precision() -> None:
    """In half precision a sum of 3000 ones stops at 256 in bfloat16, and at 2048 in float16."""
    for dtype in (torch.bfloat16, torch.float16):
        hidden = torch.ones(3000, 4, dtype=dtype)
        chunk = PooledChunk(0, 0, 3000, is_last=True)
        step = StepEmbeddings([chunk], pooling={0: RAW_MEAN}, lengths={0: 3000}, means=Means())
        step.take(hidden, make_linear(torch.ones(2, 4)))
        assert step.embeddings is not None
        check(step.embeddings, torch.ones(1, 4))
