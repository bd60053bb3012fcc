"""A worker out of settings: what it says of itself, and what it refuses."""

import os
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from gpu_worker.build import Built, build_worker
from gpu_worker.device import choose_device, choose_dtype, set_threads, zeros
from gpu_worker.figures import Figures
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.messages import WorkerReady
from tests.gpu_worker.tiny import change_config, make_model


def build(folder: Path, **settings: object) -> Built:
    made = Settings(**{"device": "cpu", "gpu_threads": 1, **settings})  # type: ignore[arg-type]
    return build_worker(made, folder, Figures(CollectorRegistry()))


def test_the_worker_says_what_it_has(llama_folder: Path) -> None:
    built = build(llama_folder, kv_cache_bytes=100_000, kv_block_tokens=8, rows=5, dtype="bfloat16")
    block_bytes = 3 * 8 * 2 * 2 * 12 * 2  # layers, tokens, k and v, heads, head_dim, bytes
    assert built.ready == WorkerReady(
        kv_blocks=100_000 // block_bytes,
        block_tokens=8,
        adapter_pool_bytes=512 << 20,
        adapter_slots=1024,
        rows=5,
        step_tokens=512,
    )
    assert built.facts["dtype"] == "torch.bfloat16"
    assert built.facts["device"] == "cpu"
    assert built.facts["kv_blocks"] == built.ready.kv_blocks


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    model.half().save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    assert build(tmp_path).facts["dtype"] == "torch.float16"


def test_room_for_no_block_is_an_error(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes: 100 bytes hold no block of 16 tokens"):
        build(llama_folder, kv_cache_bytes=100)


def test_a_dtype_that_nobody_can_compute_in_is_an_error(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    change_config(tmp_path, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="dtype: the checkpoint's dtype float8_e4m3fn"):
        build(tmp_path)
    assert choose_dtype("bfloat16", "float8_e4m3fn") == torch.bfloat16


def test_dummy_weights_need_a_configuration_and_nothing_else(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        build(tmp_path)
    assert build(tmp_path, load_format="dummy").facts["family"] == "qwen3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="device: cuda is asked for"):
        choose_device("cuda")


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 3), (4, 3), (64, 63)])
def test_of_many_cores_one_is_left_to_the_other_processes(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    set_threads(0)
    set_threads(5)
    assert set_to == [threads, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_starts_as_zeros(dtype: torch.dtype) -> None:
    made = zeros((3, 5), dtype=dtype, device=torch.device("cpu"))
    assert (tuple(made.shape), made.dtype) == ((3, 5), dtype)
    assert not made.any()
