"""A plain packer of LoRA adapters, by pipeline.adapter_layout, and an arena to put them in."""

import mmap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from pipeline.adapter_layout import MODULES, ModuleShape, layout, pack_ranks
from pipeline.messages import AdapterCopy

ModuleWeights = tuple[Tensor, Tensor]  # lora_a [r, in], lora_b [out, r], scaling folded in


class Packed(NamedTuple):
    data: bytes
    ranks: list[int]


def pack(
    weights: Mapping[tuple[int, int], ModuleWeights],
    *,
    layers: int,
    shapes: Sequence[ModuleShape],
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """weights is by (layer, module); what is missing has no adapter."""
    ranks = [0] * (layers * len(MODULES))
    for (layer, module), (a, _) in weights.items():
        ranks[layer * len(MODULES) + module] = a.shape[0]
    places = layout(ranks, shapes, dtype.itemsize)
    data = bytearray(places.nbytes)
    for (layer, module), (a, b) in weights.items():
        place = places.at(layer, module)
        for offset, matrix in ((place.a_offset, a), (place.b_offset, b.T)):
            raw = matrix.detach().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            data[offset : offset + len(raw)] = raw
    return Packed(bytes(data), ranks)


def of_peft(model: PeftModel, name: str, *, layers: int, shapes: Sequence[ModuleShape]) -> Packed:
    """One adapter of a PEFT model."""
    weights: dict[tuple[int, int], ModuleWeights] = {}
    for path, layer in model.named_modules():
        if name not in getattr(layer, "lora_A", {}):
            continue
        place = (int(path.split(".layers.")[1].split(".")[0]), MODULES.index(path.split(".")[-1]))
        scaled = layer.lora_B[name].weight * layer.scaling[name]
        weights[place] = (layer.lora_A[name].weight, scaled)
    return pack(weights, layers=layers, shapes=shapes)


def random_weights(
    *,
    ranks: Sequence[int],
    shapes: Sequence[ModuleShape],
    seed: int = 0,
    std: float = 0.3,
) -> dict[tuple[int, int], ModuleWeights]:
    """ranks is [layers * modules]; rank 0 is left out."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index, rank in enumerate(ranks):
        layer, module = divmod(index, len(MODULES))
        if rank:
            shape = shapes[module]
            a = torch.randn((rank, shape.in_features), generator=generator) * std
            b = torch.randn((shape.out_features, rank), generator=generator) * std
            weights[layer, module] = (a, b)
    return weights


def arena_of(adapters: Sequence[Packed]) -> tuple[mmap.mmap, tuple[AdapterCopy, ...]]:
    """Adapters one after the other, and the copies that bring number i into slot i."""
    arena = mmap.mmap(-1, max(1, sum(len(adapter.data) for adapter in adapters)))
    copies = []
    for slot, adapter in enumerate(adapters):
        offset = arena.tell()
        arena.write(adapter.data)
        ranks = pack_ranks(adapter.ranks)
        copies.append(AdapterCopy(slot, offset, offset, len(adapter.data), ranks))
    return arena, tuple(copies)
