"""Every family against transformers, in fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gpu_worker.batch import make_batch
from gpu_worker.worker import Worker
from pipeline.messages import NewRow, Step
from tests.gpu_worker.driving import GREEDY, Driver, ints, make_worker, prompt
from tests.gpu_worker.tiny import CONFIGS, make_model


def greedy(model: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    """What transformers says, by whole forward passes."""
    tokens = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def last_logits(worker: Worker, tokens: list[int]) -> torch.Tensor:
    """Logits after a prompt that is fed in one chunk."""
    blocks = ints(range(-(-len(tokens) // 4)))
    worker.run(
        Step(1, new_rows=(NewRow(0, -1, ints(tokens), len(tokens), 0, blocks, GREEDY, None),))
    )
    step = Step(2, prefill=np.array([[0, 0, len(tokens)]], np.int32).tobytes())
    return worker.logits(make_batch(step, worker.rows))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, name)
    tokens = prompt(1, 37)
    logits = last_logits(make_worker(tmp_path), tokens)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    driver = Driver(make_worker(tmp_path))
    driver.add(3, tokens)
    driver.add(5, prompt(2, 6))
    driver.step(prefill=[(3, 20)])
    driver.step(prefill=[(3, 10), (5, 6)])
    driver.step(prefill=[(3, 7)], decode=[5])
    for _ in range(15):
        driver.step(decode=[5, 3])
    assert driver.rows[3].produced == greedy(model, tokens, 16)
    assert driver.rows[5].produced == greedy(model, prompt(2, 6), 17)


def test_a_sharded_checkpoint_is_one_model(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    driver = Driver(make_worker(tmp_path))
    driver.add(0, prompt(1, 9))
    driver.generate([0], 8)
    assert driver.rows[0].produced == greedy(model, prompt(1, 9), 8)


@pytest.mark.parametrize("name", ["llama_llama3", "mistral", "qwen3"])
def test_bfloat16_stays_near_fp32(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, name)
    tokens = prompt(1, 37)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -1]
        rounded = model.bfloat16()(torch.tensor([tokens])).logits[0, -1].float()
    ours = last_logits(make_worker(tmp_path, dtype="bfloat16"), tokens).float()
    assert (ours - expected).norm() < 1.5 * (rounded - expected).norm()
