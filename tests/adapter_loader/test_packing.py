"""What is packed is what PEFT would add to the weights, for every form that is honoured."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapter_loader.checkpoint import BaseModel
from adapter_loader.loading import Checked, fetch_and_check, fill, pack_checked
from adapter_loader.packing import CHUNK_BYTES, is_finite, store_transposed
from adapter_loader.sources.local import LocalSource
from pipeline.adapter_layout import ALIGNMENT, MODULES, unpack_ranks
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey
from tests.adapter_loader.adapters import (
    change_config,
    change_tensors,
    delta_weights,
    describe_base,
    make_adapter,
    tensor_name,
    unpacked,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),  # and PEFT takes it back
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

HONOURED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1},
    "a rank above the width of a row": {"r": 80},
    "an odd rank": {"r": 7, "lora_alpha": 3},
    "rsLoRA": {"use_rslora": True, "r": 8, "lora_alpha": 5},
    "two modules": {"target_modules": ["q_proj", "v_proj"]},
    "one module by its full name": {"target_modules": ["model.layers.1.mlp.down_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "modules by an expression": {"target_modules": r".*\.[12]\.(self_attn\.k|mlp\.up)_proj"},
    "without some modules": {"exclude_modules": ["o_proj"]},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 1},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5},
    "a negative alpha": {"lora_alpha": -4},
    "alpha zero": {"lora_alpha": 0},
    "rank_pattern by module": {"rank_pattern": {"q_proj": 2, "mlp.up_proj": 16}},
    "rank_pattern by full name": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 9}},
    "rank_pattern by expressions": {
        "rank_pattern": {r".*\.[12]\.mlp\.\w+": 6, r"layers\.[01]\.(mlp|self_attn)\.(q|up)_proj": 3}
    },
    "rank_pattern anchored": {"rank_pattern": {"^model.layers.2.mlp.gate_proj": 5}},
    "rank_pattern, the first match wins": {"rank_pattern": {"self_attn.v_proj": 8, "v_proj": 2}},
    "rank_pattern, no part of a name": {"rank_pattern": {"proj": 2, "p_proj": 3, "attn": 5}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32, r"layers.1.mlp\..*": 1}},
    "both patterns with rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 12, "down_proj": 2},
        "alpha_pattern": {"down_proj": 24, "k_proj": 0.5},
    },
    "an orthogonal start": {"init_lora_weights": "orthogonal"},
    "a gaussian start": {"init_lora_weights": "gaussian"},
    "MiCA": {"init_lora_weights": "mica", "target_modules": ["k_proj"], "layers_to_transform": 0},
}


def check(root: Path, base: BaseModel, name: str = "x") -> Checked:
    source = LocalSource(roots=[root.resolve()], max_adapter_bytes=1 << 30)
    checked = fetch_and_check(AdapterKey("local", name), None, None, source, base)
    assert isinstance(checked, Checked)
    return checked


def load(root: Path, base: BaseModel, name: str = "x") -> tuple[bytes, bytes, str]:
    """The packed bytes, the ranks and the digest. Whatever lay in the extent is overwritten."""
    checked = check(root, base, name)
    extent = bytearray(b"\xee" * checked.plan.placed.nbytes)
    content = pack_checked(checked, partial(fill, extent=memoryview(extent)))
    return bytes(extent), checked.plan.ranks, content


def assert_same(
    found: dict[Any, Tensor], expected: dict[Any, Tensor], atol: float = 1e-5, rtol: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for place, delta in expected.items():
        torch.testing.assert_close(found[place], delta, atol=atol, rtol=rtol)


@pytest.mark.parametrize("form", HONOURED)
def test_packed_matrices_give_the_delta_weights_of_peft(
    form: str, tmp_path: Path, base: BaseModel
) -> None:
    adapted = make_adapter(tmp_path / "x", **HONOURED[form])
    extent, ranks, _ = load(tmp_path, base)
    assert_same(unpacked(extent, ranks, base), delta_weights(adapted))


@pytest.mark.parametrize("form", HONOURED)
def test_logits_with_what_is_packed_equal_those_of_peft(
    form: str, tmp_path: Path, base: BaseModel
) -> None:
    """In fp64, so that what differs is what was packed in fp32, and not the order of a sum."""
    torch.manual_seed(0)
    adapted = make_adapter(tmp_path / "x", **HONOURED[form]).eval().double()
    extent, ranks, _ = load(tmp_path, base)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        expected = adapted(tokens).logits
        model = adapted.unload()
        for (layer, module), delta in unpacked(extent, ranks, base).items():
            block, name = model.model.layers[layer], MODULES[module]
            linear = getattr(block.self_attn, name, None) or getattr(block.mlp, name)
            linear.weight += delta
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_ranks_are_exact_and_missing_modules_have_none(tmp_path: Path, base: BaseModel) -> None:
    make_adapter(
        tmp_path / "x",
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"layers.2.mlp.down_proj": 3},
    )
    ranks = unpack_ranks(check(tmp_path, base).plan.ranks)
    by_layer = [list(ranks[i : i + len(MODULES)]) for i in range(0, len(ranks), len(MODULES))]
    assert by_layer == [[4, 0, 0, 0, 0, 0, 4], [0] * 7, [4, 0, 0, 0, 0, 0, 3]]


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
def test_each_file_dtype_is_rounded_once_to_each_compute_dtype(
    compute: str, file_dtype: torch.dtype, tmp_path: Path
) -> None:
    base = describe_base(tmp_path, compute)
    make_adapter(tmp_path / "x", target_modules=["k_proj"], layers_to_transform=[0], lora_alpha=12)
    stored: dict[str, Tensor] = {}

    def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stored.update({name: tensor.to(file_dtype) for name, tensor in tensors.items()})
        return stored

    change_tensors(tmp_path / "x", cast)
    extent, ranks, _ = load(tmp_path, base)
    a, b = (
        next(tensor for name, tensor in stored.items() if side in name)
        for side in ("lora_A", "lora_B")
    )
    dtype = getattr(torch, compute)
    expected = (b.float() * 3).to(dtype).float() @ a.to(dtype).float()
    assert_same(unpacked(extent, ranks, base), {(0, 1): expected})


def test_tensors_of_one_file_may_differ_in_dtype(tmp_path: Path, base: BaseModel) -> None:
    adapted = make_adapter(tmp_path / "x")

    def cast_some(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors)[::3]:
            tensors[name] = tensors[name].bfloat16()

    change_tensors(tmp_path / "x", cast_some)
    extent, ranks, _ = load(tmp_path, base)
    assert_same(unpacked(extent, ranks, base), delta_weights(adapted), atol=0.3, rtol=0.02)


def test_the_adapters_name_may_be_part_of_the_tensor_names(tmp_path: Path, base: BaseModel) -> None:
    adapted = make_adapter(tmp_path / "x")

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"(lora_[AB])", r"\1.default", name): tensors[name] for name in tensors}

    change_tensors(tmp_path / "x", rename)
    extent, ranks, _ = load(tmp_path, base)
    assert_same(unpacked(extent, ranks, base), delta_weights(adapted))


def test_unknown_keys_that_are_off_change_nothing(tmp_path: Path, base: BaseModel) -> None:
    make_adapter(tmp_path / "x")
    before = load(tmp_path, base)
    change_config(tmp_path / "x", use_something_new=False, other=None, more={}, another=[], text="")
    assert load(tmp_path, base) == before


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_the_base_model_does_not_have_change_nothing(
    bias: str, tmp_path: Path, base: BaseModel
) -> None:
    make_adapter(tmp_path / "x")
    make_adapter(tmp_path / "y", bias=bias)
    assert load(tmp_path, base, "y") == load(tmp_path, base)


def test_a_config_may_leave_out_what_has_a_default(tmp_path: Path, base: BaseModel) -> None:
    adapted = make_adapter(tmp_path / "x", r=8, lora_alpha=8)
    (tmp_path / "x" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    extent, ranks, _ = load(tmp_path, base)
    assert_same(unpacked(extent, ranks, base), delta_weights(adapted))


def test_the_digest_tells_contents_apart_and_nothing_else(tmp_path: Path, base: BaseModel) -> None:
    for name, config in {
        "a": {},
        "b": {"lora_dropout": 0.1},
        "scaled": {"lora_alpha": 9},
        "fewer": {"target_modules": ["q_proj"]},
        "ranks": {"rank_pattern": {"q_proj": 5}},
    }.items():
        make_adapter(tmp_path / name, **config)  # type: ignore[arg-type]
    digests = {
        name: load(tmp_path, base, name)[2] for name in ("a", "b", "scaled", "fewer", "ranks")
    }
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(elements=st.integers(1, 300), data=st.data())
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    dtype: torch.dtype, elements: int, data: st.DataObject
) -> None:
    tensor = torch.linspace(-9, 9, elements).to(dtype)
    assert is_finite(tensor)
    bad = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    tensor[data.draw(st.integers(0, elements - 1))] = bad
    assert not is_finite(tensor)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BaseModel, Any]:
    """The root of an adapter `x` of several chunks, its base model, and its PEFT model."""
    folder = tmp_path_factory.mktemp("large")
    adapted = make_adapter(folder / "x", hidden=512, r=100, rank_pattern={"k_proj": 3})
    return folder, describe_base(folder / "base", hidden=512), adapted


def test_an_adapter_of_many_chunks_is_packed_whole(large: tuple[Path, BaseModel, Any]) -> None:
    root, base, adapted = large
    extent, ranks, content = load(root, base)
    assert len(extent) > 2 * CHUNK_BYTES
    assert_same(unpacked(extent, ranks, base), delta_weights(adapted), atol=1e-4)
    assert load(root, base)[2] == content


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_bad_value_is_blamed_on_its_tensor_whatever_lies_in_the_same_chunk(
    large: tuple[Path, BaseModel, Any], tmp_path: Path, layer: int, side: str
) -> None:
    root, base, _ = large
    shutil.copytree(root / "x", tmp_path / "x")
    name = tensor_name(layer, "up_proj", side)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][-1, -1] = float("inf")

    change_tensors(tmp_path / "x", spoil)
    with pytest.raises(RequestError, match=re.escape(f"tensor '{name}' has values that are not")):
        load(tmp_path, base)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    offset=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    source=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_matrix_is_stored_transposed_and_what_follows_it_is_zeroed_up_to_the_border(
    rows: int, columns: int, offset: int, dtype: torch.dtype, source: torch.dtype
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(source)
    start = offset * ALIGNMENT
    end = start + matrix.numel() * dtype.itemsize
    border = -(-end // ALIGNMENT) * ALIGNMENT
    extent = bytearray(b"\xee" * (border + ALIGNMENT))
    store_transposed(matrix, memoryview(extent), start, dtype)
    expected = matrix.T.to(dtype).flatten().view(torch.uint8).numpy().tobytes()
    before, after = b"\xee" * start, b"\xee" * ALIGNMENT
    assert bytes(extent) == before + expected + bytes(border - end) + after
