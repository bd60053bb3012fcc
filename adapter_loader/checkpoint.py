"""adapter_model.safetensors: checked against the base model, then packed into the arena.

`check` decides everything from the header, and nothing is written before it has agreed. `pack`
reads each tensor once, converts it and puts it in its place.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence

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


class LoraModule(msgspec.Struct, frozen=True):
    """The A [rank, in] and B [out, rank] of one module, in the file, and their scaling."""

    a: TensorEntry
    b: TensorEntry
    rank: int
    scaling: float


Modules = Mapping[tuple[int, int], LoraModule]  # by (layer, module)


class Plan(msgspec.Struct, frozen=True):
    """How a checkpoint will be packed. placed.nbytes is the size of the extent."""

    dtype: str
    ranks: bytes  # int16[layers, modules]
    placed: AdapterLayout
    modules: Modules


def check(descriptor: int, file_bytes: int, config: LoraConfig, base: BaseModel) -> Modules:
    """Check the file's header against config and base model. Raises RequestError."""
    size = header_bytes(os.pread(descriptor, LENGTH_BYTES, 0), file_bytes)
    header = bytearray(size)
    _read(descriptor, memoryview(header), LENGTH_BYTES)
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


def plan(modules: Modules, base: BaseModel) -> Plan:
    """Where everything will lie."""
    ranks, placed = layout_of({place: one.rank for place, one in modules.items()}, base)
    return Plan(base.dtype, ranks, placed, modules)


def layout_of(
    rank_of: Mapping[tuple[int, int], int], base: BaseModel
) -> tuple[bytes, AdapterLayout]:
    """int16[layers, modules] as it travels, and the layout, of the ranks by (layer, module)."""
    ranks = [0] * (base.layers * len(MODULES))
    for (layer, module), rank in rank_of.items():
        ranks[layer * len(MODULES) + module] = rank
    return pack_ranks(ranks), layout(ranks, base.shapes, DTYPES[base.dtype].itemsize)


def pack(descriptor: int, plan: Plan, extent: memoryview) -> str:
    """Fill the extent and return a digest of ranks and bytes.

    extent   writable, of plan.placed.nbytes bytes; its content is undefined when this raises
    raises   RequestError when a value is not finite, or does not fit the compute dtype
    """
    dtype = DTYPES[plan.dtype]
    scratch = scratch_for([plan.modules])
    for (layer, module), one in plan.modules.items():
        place = plan.placed.at(layer, module)
        a = read_tensor(descriptor, one.a, scratch)
        check_finite(one.a, a, store(a, extent, place.a_offset, dtype), plan.dtype)
        b = read_tensor(descriptor, one.b, scratch)
        scaled = b if one.scaling == 1 else b.float() * one.scaling
        check_finite(one.b, b, store(scaled.T, extent, place.b_offset, dtype), plan.dtype)
    return digest(plan.ranks, extent)


def scratch_for(checkpoints: Iterable[Modules]) -> bytearray:
    """Room for any one tensor of these checkpoints."""
    entries = (
        entry for modules in checkpoints for one in modules.values() for entry in (one.a, one.b)
    )
    return bytearray(max(entry.nbytes for entry in entries))


def read_tensor(descriptor: int, entry: TensorEntry, scratch: bytearray) -> Tensor:
    """The tensor as it is in the file. It lies in `scratch`, until that is used again."""
    _read(descriptor, memoryview(scratch)[: entry.nbytes], entry.offset)
    dtype = FILE_DTYPES[entry.dtype]
    flat = torch.frombuffer(scratch, dtype=dtype, count=math.prod(entry.shape))
    return flat.view(entry.shape)


def store(matrix: Tensor, extent: memoryview, offset: int, dtype: torch.dtype) -> Tensor:
    """Put a matrix into its place, row-major, and zero what is left until the next one.

    Returns what is stored, which lies in the extent.
    """
    target = torch.frombuffer(extent, dtype=dtype, count=matrix.numel(), offset=offset)
    target = target.view(matrix.shape)
    target.copy_(matrix)
    _clear_padding(extent, offset + matrix.numel() * dtype.itemsize)
    return target


def digest(ranks: bytes, extent: memoryview) -> str:
    """Of a packed adapter: what tells contents apart."""
    content = hashlib.sha256(ranks)
    content.update(extent)
    return content.hexdigest()


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


def _read(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from the file. A file that has become shorter is a RequestError."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise unavailable(f"{WEIGHTS_FILE} changed while it was read")
        buffer, offset = buffer[count:], offset + count


def check_finite(entry: TensorEntry, source: Tensor, target: Tensor, dtype: str) -> None:
    """Raises RequestError, which says whether the file or its conversion is to blame."""
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
