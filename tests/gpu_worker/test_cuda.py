"""The worker on a GPU against itself on the CPU in fp32; skipped where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gpu_worker.worker import Worker
from pipeline.messages import Sampling
from tests.gpu_worker.driving import Driver, Row, make_worker, prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SAMPLED = Sampling(temperature=0.7, top_p=0.9, top_k=50, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=2048,
        initializer_range=0.15,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    return made


def generate(worker: Worker, sampling: Sampling, block_tokens: int) -> list[Row]:
    """Three prompts at once, then one more while they decode; 12 tokens each."""
    driver = Driver(worker, blocks=range(100), block_tokens=block_tokens)
    for row, length in enumerate([5, 300, 17]):
        driver.add(row, prompt(row, length, 1000), sampling=sampling, logprobs=True)
    driver.generate([0, 1, 2], 6)
    driver.add(3, prompt(3, 40, 1000), sampling=sampling, logprobs=True)
    driver.step(decode=[0, 1, 2], prefill=[(3, 40)])
    for _ in range(5):
        driver.step(decode=[2, 0, 3, 1])
    return [driver.rows[row] for row in range(4)]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "flash"},
        {"attention": "flash", "cuda_graphs": False},
        {"attention": "triton", "kv_block_tokens": 16},
        {"attention": "triton", "kv_block_tokens": 16, "cuda_graphs": False},
        {"attention": "sdpa", "kv_block_tokens": 16},
    ],
    ids=["flash", "flash-eager", "triton", "triton-eager", "sdpa"],
)
def test_a_gpu_produces_what_a_cpu_does(
    folder: Path, settings: dict[str, Any], sampling: Sampling
) -> None:
    exact = generate(make_worker(folder, kv_block_tokens=16, kv_cache_bytes=1 << 24), sampling, 16)
    worker = make_worker(
        folder,
        dtype="float16",
        device="cuda",
        kv_cache_bytes=1 << 28,
        **{"kv_block_tokens": 256, **settings},
    )
    found = generate(worker, sampling, int(settings.get("kv_block_tokens", 256)))
    same = total = 0
    for one, other in zip(exact, found, strict=True):
        assert len(one.produced) == len(other.produced)
        for index, (a, b) in enumerate(zip(one.produced, other.produced, strict=True)):
            total += 1
            if a != b:
                break
            same += 1
            assert abs(one.logprobs[index] - other.logprobs[index]) < 0.05
    assert same / total > 0.9
