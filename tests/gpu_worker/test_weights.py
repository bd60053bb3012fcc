"""Model folders that are not what they say: one sentence each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.weights import (
    DUMMY_STD,
    EMBEDDING,
    LM_HEAD,
    NORM,
    Checkpoint,
    DummyCheckpoint,
    expected_shapes,
)
from pipeline.errors import ConfigError
from pipeline.model_config import read_model_config
from tests.gpu_worker.tiny import change_config, make_model

CPU = torch.device("cpu")
QUERY = "model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path, "llama")
    return tmp_path


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(folder, read_model_config(folder), dtype=dtype, device=CPU)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, open_checkpoint(folder):
        pass
    return str(caught.value)


def test_tensors_come_in_the_compute_dtype(folder: Path) -> None:
    with open_checkpoint(folder, torch.bfloat16) as checkpoint:
        assert checkpoint.read(NORM).dtype == torch.bfloat16
        assert checkpoint.read(QUERY).shape == (48, 48)


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(QUERY))
    assert refusal(folder) == f"model_id: {folder} lacks the tensor {QUERY}"


def test_an_unexpected_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.more": torch.zeros(1)}))
    assert refusal(folder) == f"model_id: {folder} has an unexpected tensor model.more"


def test_a_bias_that_the_configuration_does_not_have(folder: Path) -> None:
    name = QUERY.replace("weight", "bias")
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(48)}))
    assert name in refusal(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({QUERY: torch.zeros(48, 40)}))
    assert refusal(folder) == f"model_id: {QUERY} has the shape [48, 40]; config.json says [48, 48]"


def test_a_tensor_of_another_kind(folder: Path) -> None:
    rewrite(
        folder, lambda tensors: tensors.update({QUERY: torch.zeros((48, 48), dtype=torch.int8)})
    )
    assert refusal(folder) == f"model_id: {QUERY} is stored as I8"


def test_an_output_layer_may_lie_beside_the_embedding_that_it_is_tied_to(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    with open_checkpoint(folder) as checkpoint:
        assert LM_HEAD in checkpoint
        assert EMBEDDING in checkpoint


def test_inverse_frequencies_of_old_checkpoints_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(6)}))
    with open_checkpoint(folder) as checkpoint:
        assert name in checkpoint


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, 5000)
    assert refusal(folder).startswith(f"model_id: cannot read {path}: ")


def test_no_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    assert refusal(folder).startswith(f"model_id: cannot read {path}: ")


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "cannot be used"),
        (json.dumps({"weight_map": 3}), "cannot be used"),
        (json.dumps({"weight_map": {NORM: "../model.safetensors"}}), "outside its folder"),
        (json.dumps({"weight_map": {NORM: "model-1.safetensors"}}), "cannot read"),
    ],
)
def test_an_index_that_cannot_be_used(folder: Path, index: str, sentence: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert sentence in refusal(folder)


def dummy(folder: Path, dtype: torch.dtype = torch.float32) -> DummyCheckpoint:
    return DummyCheckpoint(read_model_config(folder), dtype=dtype, device=CPU)


def test_dummy_weights_need_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shapes = expected_shapes(read_model_config(folder))
    with dummy(folder, torch.bfloat16) as checkpoint:
        read = {name: checkpoint.read(name) for name in shapes}
        assert all(name in checkpoint for name in shapes)
        assert "model.more" not in checkpoint
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == shapes
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}


def test_dummy_weights_are_normal_and_those_of_norms_are_one(folder: Path) -> None:
    checkpoint = dummy(folder)
    embedding = checkpoint.read(EMBEDDING)
    assert embedding.std().item() == pytest.approx(DUMMY_STD, rel=0.05)
    assert embedding.mean().item() == pytest.approx(0, abs=0.001)
    for name in (NORM, "model.layers.0.input_layernorm.weight"):
        assert (checkpoint.read(name) == 1).all()


def test_dummy_weights_differ_by_name_and_come_back_at_each_start(folder: Path) -> None:
    first, second = dummy(folder), dummy(folder)
    other = QUERY.replace("q_proj", "o_proj")
    second.read(other)
    assert torch.equal(first.read(QUERY), second.read(QUERY))
    assert not torch.equal(first.read(QUERY), first.read(other))
