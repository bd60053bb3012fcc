"""adapter_model.safetensors: its header, checked against config and base model.

This decides everything that the header can; nothing is packed before it has agreed.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec
import torch

from adapter_loader.peft_config import LoraConfig
from adapter_loader.refusals import invalid, shown
from adapter_loader.safetensors_header import (
    LENGTH_BYTES,
    TensorEntry,
    header_bytes,
    parse_header,
)
from adapter_loader.sources import WEIGHTS_FILE
from adapter_loader.weights_file import read_exactly
from pipeline.adapter_layout import MODULES, ModuleShape
from pipeline.adapter_roots import CONFIG_FILE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

BLOCK_OF_MODULE = {
    module: "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    for module in MODULES
}
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<name>model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})"
    r"\.(?P<block>self_attn|mlp)\.(?P<module>\w+))"
    r"\.lora_(?P<side>[AB])\.(default\.)?weight",
    re.ASCII,
)
# What people do train beside the matrices, to be named in the refusal.
_FEATURES = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "an adapter of the embeddings"),
    ("trainable_tokens", "trained tokens"),
    ("embed_tokens", "embeddings"),
    ("lm_head", "the output layer"),
    ("modules_to_save", "modules_to_save"),
    (".bias", "a bias"),
)


class BaseModel(msgspec.Struct, frozen=True):
    """What an adapter has to fit."""

    layers: int
    shapes: tuple[ModuleShape, ...]  # of adapter_layout.MODULES
    dtype: str  # the compute dtype, a key of DTYPES


class LoraModule(msgspec.Struct, frozen=True, gc=False):
    """The A [rank, in] and B [out, rank] of one module, in the file, and their scaling."""

    a: TensorEntry
    b: TensorEntry
    rank: int
    scaling: float


Modules = Mapping[tuple[int, int], LoraModule]  # by (layer, module)


def check(descriptor: int, file_bytes: int, config: LoraConfig, base: BaseModel) -> Modules:
    """Check the file's header against config and base model. Raises RequestError."""
    length = bytearray(min(LENGTH_BYTES, file_bytes))
    read_exactly(descriptor, [memoryview(length)], 0)
    header = bytearray(header_bytes(bytes(length), file_bytes))
    read_exactly(descriptor, [memoryview(header)], LENGTH_BYTES)
    found = _by_place(parse_header(bytes(header), file_bytes), base)
    places = sorted({(layer, module) for layer, module, _ in found})
    rules = config.ranks_and_scalings([module_name(*place) for place in places])
    modules = {}
    for place, (rank, scaling) in zip(places, rules, strict=True):
        a = found.get((*place, "A"))
        b = found.get((*place, "B"))
        if a is None or b is None:
            side = "lora_B" if b is None else "lora_A"
            raise invalid(f"module {module_name(*place)} has no {side} weight")
        _check_shapes(a, b, rank, base.shapes[place[1]], config)
        modules[place] = LoraModule(a, b, rank, scaling)
    return modules


def _by_place(
    entries: Sequence[TensorEntry], base: BaseModel
) -> dict[tuple[int, int, str], TensorEntry]:
    """(layer, module, "A" or "B") -> tensor. Raises RequestError for any tensor that is neither."""
    found: dict[tuple[int, int, str], TensorEntry] = {}
    for entry in entries:
        match = _TENSOR_NAME.fullmatch(entry.name)
        if match is None or BLOCK_OF_MODULE.get(match["module"]) != match["block"]:
            raise invalid(_unknown_tensor(entry.name))
        layer = int(match["layer"])
        if layer >= base.layers:
            raise invalid(
                f"tensor {shown(entry.name)} is for layer {layer}, and this base model has "
                f"{base.layers} layers: it is an adapter for another base model"
            )
        place = (layer, MODULES.index(match["module"]), match["side"])
        if place in found:
            raise invalid(f"tensors {shown(entry.name)} and {shown(found[place].name)} are one")
        found[place] = entry
    if not found:
        raise invalid(f"{WEIGHTS_FILE} holds no LoRA weights")
    return found


def _unknown_tensor(name: str) -> str:
    for part, feature in _FEATURES:
        if part in name:
            return f"tensor {shown(name)} belongs to {feature}, which is not supported"
    return f"tensor {shown(name)} is not a LoRA weight of a linear layer of this base model"


def module_name(layer: int, module: int) -> str:
    """As in the base model, which is what the patterns of the config are matched with."""
    name = MODULES[module]
    return f"model.layers.{layer}.{BLOCK_OF_MODULE[name]}.{name}"


def _check_shapes(
    a: TensorEntry, b: TensorEntry, rank: int, shape: ModuleShape, config: LoraConfig
) -> None:
    for entry, width_at, width, expected in (
        (a, 1, shape.in_features, (rank, shape.in_features)),
        (b, 0, shape.out_features, (shape.out_features, rank)),
    ):
        if entry.shape == expected:
            continue
        if len(entry.shape) == 2 and entry.shape[width_at] == width:
            raise invalid(
                f"tensor {shown(entry.name)} has rank {entry.shape[1 - width_at]}, "
                f"but {CONFIG_FILE} says {rank}"
            )
        trained = config.base_model_name_or_path
        raise invalid(
            f"it is an adapter for another base model{f' ({shown(trained)})' if trained else ''}: "
            f"tensor {shown(entry.name)} has the shape {list(entry.shape)}, "
            f"and {list(expected)} is expected"
        )
