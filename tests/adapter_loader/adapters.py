"""Tiny base models and PEFT adapters for them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_loader.checkpoint import DTYPES, BaseModel
from pipeline.adapter_layout import MODULES, layout, unpack_ranks
from pipeline.model_config import read_model_config

LAYERS = 3
ALL_MODULES = list(MODULES)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def base_config(hidden: int = 64, layers: int = LAYERS) -> LlamaConfig:
    """Its seven modules have five different shapes."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=32,
        dtype="float32",
    )


def describe_base(
    folder: Path, dtype: str = "float32", hidden: int = 64, layers: int = LAYERS
) -> BaseModel:
    """What the loader sees of base_config(hidden, layers), which is written to `folder`."""
    base_config(hidden, layers).save_pretrained(folder)
    config = read_model_config(folder)
    return BaseModel(config.layers, config.module_shapes(), dtype)


def make_adapter(folder: Path, hidden: int = 64, layers: int = LAYERS, **config: Any) -> Any:
    """Save a random adapter, and return the PEFT model that has it."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ALL_MODULES, **config}
    adapted = get_peft_model(LlamaForCausalLM(base_config(hidden, layers)), LoraConfig(**values))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator)
    adapted.save_pretrained(str(folder))
    return adapted


def delta_weights(adapted: Any, name: str = "default") -> dict[tuple[int, int], Tensor]:
    """(layer, module) -> what PEFT adds to that weight, fp32 [out, in]."""
    deltas = {}
    for layer, block in enumerate(adapted.base_model.model.model.layers):
        for module, part in enumerate(MODULES):
            linear = getattr(block.self_attn, part, None) or getattr(block.mlp, part)
            if name in getattr(linear, "lora_A", {}):
                deltas[layer, module] = linear.get_delta_weight(name).detach()
    return deltas


def unpacked(extent: bytes, ranks: bytes, base: BaseModel) -> dict[tuple[int, int], Tensor]:
    """(layer, module) -> B @ A of a packed adapter, fp32 [out, in]."""
    dtype = DTYPES[base.dtype]
    placed = layout(unpack_ranks(ranks), base.shapes, dtype.itemsize)
    buffer = bytearray(extent)

    def matrix(offset: int, rows: int, columns: int) -> Tensor:
        flat = torch.frombuffer(buffer, dtype=dtype, count=rows * columns, offset=offset)
        return flat.view(rows, columns).float()

    deltas = {}
    for layer in range(base.layers):
        for module, shape in enumerate(base.shapes):
            place = placed.at(layer, module)
            if place.rank:
                a = matrix(place.a_offset, place.rank, shape.in_features)
                b = matrix(place.b_offset, place.rank, shape.out_features).T
                deltas[layer, module] = b @ a
    return deltas


def change_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
) -> None:
    """Rewrite the weights with what `change` returns, or has changed in place."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / WEIGHTS)


def tensor_name(layer: int, module: str, side: str, infix: str = "") -> str:
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"{PREFIX}model.layers.{layer}.{block}.{module}.lora_{side}{infix}.weight"


def safetensors_bytes(header: object, body: bytes = b"") -> bytes:
    """A file with any header, right or wrong."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data + body


def entries_of(tensors: Sequence[tuple[str, str, list[int], int]]) -> dict[str, object]:
    """A header of (name, dtype, shape, nbytes), one after another."""
    header: dict[str, object] = {}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return header
