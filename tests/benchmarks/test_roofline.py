"""The floor of a load, against figures worked out by hand."""

import pytest

from benchmarks.adapters import AdapterKind
from benchmarks.models import make_model
from benchmarks.roofline import (
    decode_step_seconds,
    linear_seconds,
    load_seconds,
    prefill_seconds,
)
from pipeline.model_config import ModelConfig, read_model_config

ADAPTER_BYTES = 83_886_080  # rank 16 on seven linear layers of 32 layers


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_model_config(make_model("llama-3.1-8b", tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize(
    ("rows", "milliseconds"),
    [(1, 4.05), (32, 4.33), (48, 4.45), (128, 4.80), (192, 5.485), (512, 10.9), (1024, 21.8)],
)
def test_linear_layers_lie_between_the_measured_batches(rows: int, milliseconds: float) -> None:
    assert linear_seconds(rows) == pytest.approx(milliseconds * 1e-3)


def test_an_adapter_of_rank_16_has_84_megabytes(config: ModelConfig) -> None:
    assert AdapterKind().nbytes(config) == ADAPTER_BYTES


def test_a_decode_step_reads_the_kv_of_its_rows_and_each_adapter_once(config: ModelConfig) -> None:
    base = decode_step_seconds(config, rows=128, context=192, adapter_bytes=0)
    assert base == pytest.approx(4.80e-3 + 128 * 192 * 131072 / 4.28e12)
    adapted = decode_step_seconds(config, rows=128, context=192, adapter_bytes=128 * ADAPTER_BYTES)
    assert adapted - base == pytest.approx(2.509e-3, rel=1e-3)


def test_prompts_take_two_operations_per_weight_and_token(config: ModelConfig) -> None:
    weights = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    attention = 32 * 4096 * 128
    head = 128256 * 4096
    flops = 2 * 128 * (128 * (weights + attention) + head)
    assert prefill_seconds(config, requests=128, tokens=128) == pytest.approx(flops / 780e12)


def test_a_short_prompt_alone_waits_for_the_weights(config: ModelConfig) -> None:
    assert prefill_seconds(config, requests=1, tokens=10) == linear_seconds(1)


def test_a_request_alone_makes_247_tokens_per_second_at_most(config: ModelConfig) -> None:
    seconds = load_seconds(config, requests=1, tokens_in=128, tokens_out=128, adapter_bytes=0)
    assert 128 / seconds == pytest.approx(247, abs=1)


@pytest.mark.parametrize(("adapters", "share"), [(1, 0.997), (32, 0.926), (128, 0.758)])
def test_adapters_take_their_share_of_the_base_models_rate(
    config: ModelConfig, adapters: int, share: float
) -> None:
    load = {"requests": 128, "tokens_in": 128, "tokens_out": 128}
    base = load_seconds(config, **load, adapter_bytes=0)
    assert 128 * 128 / base == pytest.approx(16_400, rel=0.01)
    adapted = load_seconds(config, **load, adapter_bytes=adapters * ADAPTER_BYTES)
    assert base / adapted == pytest.approx(share, abs=1e-3)
