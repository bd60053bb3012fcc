"""Merged adapters are those of PEFT's add_weighted_adapter, and of the published formulas."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.merge_utils import prune
from torch import Tensor
from transformers import LlamaForCausalLM

from adapter_loader.checkpoint import BaseModel
from adapter_loader.loading import (
    Checked,
    Unchanged,
    fetch_and_check,
    fill,
    guarded,
    pack_checked,
)
from adapter_loader.merging import average_by_sign, drop_at_random, keep_largest, seed_of
from adapter_loader.sources.local import LocalSource
from pipeline.messages import (
    MERGED,
    AdapterKey,
    Failure,
    FailureKind,
    MajoritySign,
    Merge,
    MergePart,
    MergeStrategy,
)
from tests.adapter_loader.adapters import (
    ALL_MODULES,
    base_config,
    change_config,
    delta_weights,
    unpacked,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PAIR = ("first", "second")
CONFIGS: dict[str, dict[str, Any]] = {
    "first": {"r": 4, "lora_alpha": 8},
    "second": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
    },
    "third": {"r": 7, "lora_alpha": 5},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root").resolve()


@pytest.fixture(scope="module")
def adapted(root: Path) -> Any:
    """The PEFT model of all of CONFIGS, which lie below the root."""
    configs = {
        name: LoraConfig(**{"target_modules": ALL_MODULES, **config})
        for name, config in CONFIGS.items()
    }
    model = get_peft_model(LlamaForCausalLM(base_config()), configs["first"], adapter_name="first")
    for name in ("second", "third"):
        model.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator)
    model.save_pretrained(str(root))
    return model


def key_of(ids: Sequence[str], weights: Sequence[float], strategy: str, **merge: Any) -> AdapterKey:
    parts = tuple(
        MergePart(AdapterKey("local", name), weight)
        for name, weight in zip(ids, weights, strict=True)
    )
    return AdapterKey(MERGED, "m", merge=Merge(parts, MergeStrategy(strategy), **merge))


def load(root: Path, base: BaseModel, key: AdapterKey) -> tuple[bytes, bytes, str] | Failure:
    source = LocalSource(roots=[root], max_adapter_bytes=1 << 30)

    def job() -> tuple[bytes, bytes, str]:
        checked = fetch_and_check(key, None, None, source, base)
        assert isinstance(checked, Checked)
        extent = bytearray(b"\xee" * checked.plan.placed.nbytes)
        content = pack_checked(checked, partial(fill, extent=memoryview(extent)))
        return bytes(extent), checked.plan.ranks, content

    return guarded(key, job)


def deltas(root: Path, base: BaseModel, key: AdapterKey) -> dict[tuple[int, int], Tensor]:
    loaded = load(root, base, key)
    assert not isinstance(loaded, Failure), loaded
    return unpacked(loaded[0], loaded[1], base)


WEIGHTS = [(1.0, 1.0), (0.7, 0.2), (2.0, -0.5), (-1.0, 0.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("strategy", "density", "sign"),
    [
        ("linear", 1.0, "total"),
        ("cat", 1.0, "total"),
        ("ties", 0.4, "total"),
        ("ties", 0.4, "frequency"),
        ("ties", 0.99, "total"),
    ],
)
def test_a_merge_is_that_of_peft(
    strategy: str,
    density: float,
    sign: str,
    weights: tuple[float, float],
    root: Path,
    adapted: Any,
    base: BaseModel,
) -> None:
    name = f"{strategy} {density} {sign} {weights}".replace(".", "_")
    adapted.add_weighted_adapter(
        adapters=["first", "second"],
        weights=list(weights),
        adapter_name=name,
        combination_type=strategy,
        density=density,
        majority_sign_method=sign,
    )
    expected = delta_weights(adapted, name)
    key = key_of(
        ["first", "second"], weights, strategy, density=density, majority_sign=MajoritySign(sign)
    )
    found = deltas(root, base, key)
    assert found.keys() == expected.keys()
    for place, delta in expected.items():
        torch.testing.assert_close(found[place], delta, atol=1e-4, rtol=1e-4)


def test_cat_adds_adapters_of_unequal_ranks_exactly(
    root: Path, adapted: Any, base: BaseModel
) -> None:
    found = deltas(root, base, key_of(list(CONFIGS), (0.5, -2.0, 1.5), "cat"))
    parts = [delta_weights(adapted, name) for name in CONFIGS]
    for place, delta in found.items():
        expected = sum(
            weight * part[place]
            for weight, part in zip((0.5, -2.0, 1.5), parts, strict=True)
            if place in part
        )
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["linear", "cat"])
def test_one_part_with_a_weight_is_a_scaled_adapter(
    strategy: str, root: Path, adapted: Any, base: BaseModel
) -> None:
    found = deltas(root, base, key_of(["third"], (-0.25,), strategy))
    for place, delta in delta_weights(adapted, "third").items():
        torch.testing.assert_close(found[place], -0.25 * delta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
def test_dare_with_all_kept_is_what_it_is_without_dropping(
    strategy: str, root: Path, adapted: Any, base: BaseModel
) -> None:
    found = deltas(root, base, key_of(PAIR, (0.7, 0.2), strategy))
    expected = deltas(root, base, key_of(PAIR, (0.7, 0.2), strategy.removeprefix("dare_")))
    assert all(found[place].equal(expected[place]) for place in expected)


def test_a_seed_makes_the_same_lots_again_and_another_seed_others(
    root: Path, adapted: Any, base: BaseModel
) -> None:
    contents = [
        load(root, base, key_of(PAIR, (1, 1), "dare_linear", density=0.5, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert contents[0] == contents[1] != contents[2]


@given(density=st.floats(0.05, 0.95), seed=st.integers(0, 1 << 40))
def test_dropping_is_pefts_rescaled_by_the_density(density: float, seed: int) -> None:
    matrix = torch.linspace(-3, 5, 200).view(8, 25)
    torch.manual_seed(seed)
    expected = prune(matrix, density, method="random", rescale=True)
    torch.testing.assert_close(drop_at_random(matrix, density, seed), expected)


def test_dropping_keeps_the_expectation() -> None:
    kept = drop_at_random(torch.ones(400, 500), 0.25, seed=3)
    assert set(kept.flatten().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1, abs=0.02)


def test_each_part_and_matrix_draws_lots_of_its_own() -> None:
    merge = Merge((), MergeStrategy.DARE_TIES, seed=1)
    seeds = {seed_of(merge, part, name) for part in range(3) for name in ("x.A", "x.B", "y.A")}
    assert len(seeds) == 9


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), density=st.floats(0.01, 1))
def test_the_largest_values_are_kept(rows: int, columns: int, density: float) -> None:
    matrix = (torch.randperm(rows * columns) + 1.0).view(rows, columns) * -1
    kept = keep_largest(matrix, density)
    count = int(density * matrix.numel())
    assert int((kept != 0).sum()) == count
    assert sorted(kept[kept != 0].tolist()) == sorted(matrix.flatten().tolist())[:count]


def test_those_of_the_elected_sign_are_averaged() -> None:
    matrices = torch.tensor([[[3.0, -1, 0, -1]], [[-1.0, -2, 0, -1]], [[-1.0, 5, 2, 2]]])
    weights = torch.ones(3, 1, 1)
    by_sum = average_by_sign(matrices, weights, MajoritySign.TOTAL)
    by_count = average_by_sign(matrices, weights, MajoritySign.FREQUENCY)
    assert by_sum.tolist() == [[3, 5, 2, 2]]
    assert by_count.tolist() == [[-1, -1.5, 2, -1]]


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_unequal_ranks_are_refused(
    strategy: str, root: Path, adapted: Any, base: BaseModel
) -> None:
    failure = load(root, base, key_of(["first", "third"], (1, 1), strategy))
    assert isinstance(failure, Failure)
    assert failure.kind == FailureKind.ADAPTER_INVALID
    assert "4, 7" in failure.message
    assert strategy in failure.message


def test_more_ranks_than_can_be_are_refused(root: Path, adapted: Any, base: BaseModel) -> None:
    failure = load(root, base, key_of(["third"] * 80, (1,) * 80, "cat"))
    assert isinstance(failure, Failure)
    assert "rank 560" in failure.message


@pytest.mark.parametrize(("name", "word"), [("missing", "no such adapter"), ("bad", "use_dora")])
def test_a_part_that_cannot_be_had_is_named(
    name: str, word: str, root: Path, adapted: Any, base: BaseModel
) -> None:
    source = root / "second"
    if name == "bad" and not (root / "bad").exists():
        (root / "bad").mkdir()
        for file in source.iterdir():
            (root / "bad" / file.name).write_bytes(file.read_bytes())
        change_config(root / "bad", use_dora=True)
    failure = load(root, base, key_of(["first", name], (1, 1), "linear"))
    assert isinstance(failure, Failure)
    assert failure.message.startswith(f"adapter m: part {name}: ")
    assert word in failure.message


def test_a_merge_whose_values_are_too_large_is_refused(
    root: Path, adapted: Any, base: BaseModel
) -> None:
    failure = load(root, base, key_of(["first"], (1e39,), "cat"))
    assert isinstance(failure, Failure)
    assert "too large for float32" in failure.message


def test_a_merge_is_unchanged_while_all_of_its_parts_are(
    root: Path, adapted: Any, base: BaseModel
) -> None:
    source = LocalSource(roots=[root], max_adapter_bytes=1 << 30)
    key = key_of(PAIR, (1, 1), "linear")
    first = fetch_and_check(key, None, None, source, base)
    assert isinstance(first, Checked)
    first.close()
    assert isinstance(fetch_and_check(key, None, first.identity, source, base), Unchanged)
    config = root / "second" / "adapter_config.json"
    config.write_bytes(config.read_bytes() + b" ")
    second = fetch_and_check(key, None, first.identity, source, base)
    assert isinstance(second, Checked)
    second.close()
