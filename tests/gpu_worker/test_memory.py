"""How device memory is divided."""

import pytest

from gpu_worker.memory import Division, StepSizes, divide, step_sizes
from pipeline.config import Settings
from pipeline.errors import ConfigError

SETTINGS = Settings(gpu_memory_fraction=0.9, adapter_pool_fraction=0.25)


def test_the_cpu_has_defaults_of_its_own() -> None:
    assert divide(Settings(), total=None, free=0) == Division(1 << 30, 512 << 20)


def test_what_is_left_on_a_device_is_shared() -> None:
    assert divide(SETTINGS, total=1000, free=500) == Division(kv_cache=300, adapter_pool=100)


def test_what_is_set_is_kept_and_the_other_gets_its_share_of_the_rest() -> None:
    pool = Settings(gpu_memory_fraction=0.9, adapter_pool_bytes=150)
    assert divide(pool, total=1000, free=500) == Division(250, 150)
    cache = Settings(gpu_memory_fraction=0.9, adapter_pool_fraction=0.25, kv_cache_bytes=200)
    assert divide(cache, total=1000, free=500) == Division(200, 50)


@pytest.mark.parametrize("wanted", [{}, {"kv_cache_bytes": 350}, {"adapter_pool_bytes": 60}])
def test_too_little_memory_is_a_sentence(wanted: dict[str, int]) -> None:
    settings = Settings(gpu_memory_fraction=0.5, **wanted)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"gpu_memory_fraction: .* bytes of the device are left"):
        divide(settings, total=1000, free=500 if not wanted else 550)


def sizes(total: int | None, *, kv_blocks: int = 10_000, **settings: int) -> StepSizes:
    """A token takes 1000 bytes; a tenth of the device's memory is not ours."""
    made = Settings(gpu_memory_fraction=0.9, **settings)  # type: ignore[arg-type]
    return step_sizes(made, total=total, kv_blocks=kv_blocks, token_bytes=1000)


def test_steps_are_larger_on_a_gpu() -> None:
    assert sizes(None) == (64, 512)
    assert sizes(1 << 40) == (256, 4096)


def test_steps_are_as_large_as_memory_allows() -> None:
    assert sizes(40_010_000) == (256, 2000)
    assert sizes(1_000_000) == (256, 512)
    assert sizes(1 << 40, kv_blocks=100) == (100, 4096)


def test_sizes_of_steps_that_are_set_are_kept() -> None:
    assert sizes(1_000_000, rows=300, step_tokens=5000) == (300, 5000)
    assert sizes(None, rows=1000) == (1000, 1000)
    assert sizes(None, step_tokens=9) == (9, 9)
