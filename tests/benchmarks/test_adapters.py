"""Adapters for benchmarks are such that the loader takes."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapter_loader.checkpoint import BaseModel, check
from adapter_loader.packing import plan
from adapter_loader.peft_config import parse_peft_config
from adapter_loader.sources.local import LocalSource
from benchmarks.adapters import AdapterKind, write_adapters
from benchmarks.models import make_model
from pipeline.adapter_layout import MODULES, unpack_ranks
from pipeline.messages import AdapterKey
from pipeline.model_config import ModelConfig, read_model_config

QUERY_VALUE = AdapterKind(rank=4, modules=("q_proj", "v_proj"))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read_model_config(make_model("tiny", tmp_path))


def ranks(root: Path, name: str, config: ModelConfig) -> tuple[list[int], int]:
    """What the loader finds: the ranks and the packed size."""
    source = LocalSource(roots=[root.resolve()], max_adapter_bytes=1 << 30)
    files = source.fetch(AdapterKey("local", name), None)
    try:
        base = BaseModel(config.layers, config.module_shapes(), "bfloat16")
        peft = parse_peft_config(files.config)
        planned = plan(check(files.weights, files.weights_bytes, peft, base), base)
    finally:
        files.close()
    return list(unpack_ranks(planned.ranks)), planned.placed.nbytes


@pytest.mark.parametrize("kind", [AdapterKind(rank=8), QUERY_VALUE])
def test_the_loader_finds_the_ranks_that_were_asked_for(
    tmp_path: Path, config: ModelConfig, kind: AdapterKind
) -> None:
    write_adapters(tmp_path / "adapters", config, [("one", kind)])
    expected = [kind.rank if module in kind.modules else 0 for module in MODULES]
    found, nbytes = ranks(tmp_path / "adapters", "one", config)
    assert found == expected * config.layers
    assert nbytes == kind.nbytes(config)


def test_each_adapter_has_weights_of_its_own(tmp_path: Path, config: ModelConfig) -> None:
    names = [f"a{number}" for number in range(4)]
    write_adapters(tmp_path, config, [(name, QUERY_VALUE) for name in names])
    assert len({(tmp_path / name / WEIGHTS).read_bytes() for name in names}) == 4
    for tensor in load_file(tmp_path / "a0" / WEIGHTS).values():
        assert 0.01 < tensor.float().std() < 0.03


def test_fewer_files_than_adapters_are_linked_and_still_load(
    tmp_path: Path, config: ModelConfig
) -> None:
    root = tmp_path / "adapters"
    kinds = [(f"a{number}", QUERY_VALUE) for number in range(6)]
    kinds.append(("other", AdapterKind(rank=8)))
    write_adapters(root, config, kinds, distinct=2)
    inodes = {name: (root / name / WEIGHTS).stat().st_ino for name, _ in kinds}
    assert len(set(inodes.values())) == 3
    assert inodes["a4"] == inodes["a0"]
    assert ranks(root, "a5", config) == ranks(root, "a0", config)
