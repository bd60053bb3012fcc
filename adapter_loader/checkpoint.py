"""adapter_model.safetensors: checked against the base model, then packed into the arena.

`plan` decides everything from the header, and nothing is written before it has agreed. `pack`
reads each tensor once, converts it and puts it in its place.
"""

import hashlib
import math
import os
import re
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from adapter_loader.peft_config import LoraConfig
from adapter_loader.refusals import invalid, shown, unavailable
from adapter_loader.safetensors_header import (
    LENGTH_BYTES,
    TensorEntry,
    header_bytes,
    parse_header,
)
from adapter_loader.sources import WEIGHTS_FILE
from pipeline.adapter_layout import (
    ALIGNMENT,
    MODULES,
    AdapterLayout,
    ModuleShape,
    layout,
    pack_ranks,
)
from pipeline.adapter_roots import CONFIG_FILE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

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


class Matrix(msgspec.Struct, frozen=True):
    """An A [rank, in] or a B [out, rank] on its way from the file to the extent."""

    entry: TensorEntry
    offset: int  # bytes from the extent's start
    scaling: float  # 1 for an A
    transposed: bool  # in the extent, as a B is


class Plan(msgspec.Struct, frozen=True):
    """How a checkpoint will be packed. nbytes is the size of the extent."""

    dtype: str
    nbytes: int
    ranks: bytes  # int16[layers, modules]
    matrices: tuple[Matrix, ...]  # in the order of the file


def plan(descriptor: int, file_bytes: int, config: LoraConfig, base: BaseModel) -> Plan:
    """Check the file's header against config and base model. Raises RequestError."""
    size = header_bytes(os.pread(descriptor, LENGTH_BYTES, 0), file_bytes)
    header = bytearray(size)
    _read(descriptor, memoryview(header), LENGTH_BYTES)
    entries = parse_header(bytes(header), file_bytes)
    found = _by_place(entries, base)
    modules = sorted({(layer, module) for layer, module, _ in found})
    names = [_module_name(layer, module) for layer, module in modules]
    rules = dict(zip(modules, config.ranks_and_scalings(names), strict=True))
    ranks = [0] * (base.layers * len(MODULES))
    for (layer, module), (rank, _) in rules.items():
        a = found.get((layer, module, "A"))
        b = found.get((layer, module, "B"))
        if a is None or b is None:
            side = "lora_B" if b is None else "lora_A"
            raise invalid(f"module {_module_name(layer, module)} has no {side} weight")
        _check_shapes(a, b, rank, base.shapes[module], config)
        ranks[layer * len(MODULES) + module] = rank
    placed = layout(ranks, base.shapes, DTYPES[base.dtype].itemsize)
    matrices = tuple(_place(place, entry, placed, rules) for place, entry in found.items())
    return Plan(base.dtype, placed.nbytes, pack_ranks(ranks), matrices)


def pack(descriptor: int, plan: Plan, extent: memoryview) -> str:
    """Fill the extent and return a digest of ranks and bytes.

    extent   writable, of plan.nbytes bytes; its content is undefined when this raises
    raises   RequestError when a value is not finite, or does not fit the compute dtype
    """
    scratch = bytearray(max(matrix.entry.nbytes for matrix in plan.matrices))
    dtype = DTYPES[plan.dtype]
    for matrix in plan.matrices:
        entry = matrix.entry
        _read(descriptor, memoryview(scratch)[: entry.nbytes], entry.offset)
        file_dtype = FILE_DTYPES[entry.dtype]
        elements = entry.nbytes // file_dtype.itemsize
        source = torch.frombuffer(scratch, dtype=file_dtype, count=elements)
        target = torch.frombuffer(extent, dtype=dtype, count=elements, offset=matrix.offset)
        scaled = source if matrix.scaling == 1 else source.float() * matrix.scaling
        if matrix.transposed:
            rows, columns = entry.shape
            target.view(columns, rows).copy_(scaled.view(rows, columns).T)
        else:
            target.copy_(scaled)
        _check_finite(entry, source, target, plan.dtype)
        _clear_padding(extent, matrix.offset + elements * dtype.itemsize)
    digest = hashlib.sha256(plan.ranks)
    digest.update(extent)
    return digest.hexdigest()


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


def _module_name(layer: int, module: int) -> str:
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


def _place(
    place: tuple[int, int, str],
    entry: TensorEntry,
    placed: AdapterLayout,
    rules: dict[tuple[int, int], tuple[int, float]],
) -> Matrix:
    layer, module, side = place
    placement = placed.at(layer, module)
    if side == "A":
        return Matrix(entry, placement.a_offset, 1, transposed=False)
    return Matrix(entry, placement.b_offset, rules[layer, module][1], transposed=True)


def _read(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from the file. A file that has become shorter is a RequestError."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise unavailable(f"{WEIGHTS_FILE} changed while it was read")
        buffer, offset = buffer[count:], offset + count


def _check_finite(entry: TensorEntry, source: Tensor, target: Tensor, dtype: str) -> None:
    if is_finite(target):
        return
    if is_finite(source):
        raise invalid(f"tensor {shown(entry.name)} has values that are too large for {dtype}")
    raise invalid(f"tensor {shown(entry.name)} has values that are not finite (NaN or infinite)")


def is_finite(tensor: Tensor) -> bool:
    """As tensor.isfinite().all(), in a tenth of its time: both extremes are NaN if one value is."""
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _clear_padding(extent: memoryview, end: int) -> None:
    """Zero what is left until the next matrix, which another adapter may have written."""
    aligned = -(-end // ALIGNMENT) * ALIGNMENT
    extent[end:aligned] = bytes(aligned - end)
