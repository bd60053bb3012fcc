"""A checked checkpoint becomes a packed adapter: read once, converted, checked, digested.

It goes chunk by chunk, each a run of whole groups of the layout, small enough that what was read
still lies in the processor's cache when it is put in its place, looked at and digested. All of it
happens in calls that let other threads run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from adapter_loader.checkpoint import DTYPES, BaseModel, Modules
from adapter_loader.refusals import invalid, shown, unavailable
from adapter_loader.safetensors_header import TensorEntry
from adapter_loader.sources import WEIGHTS_FILE
from adapter_loader.weights_file import FILE_DTYPES, read_exactly, read_tensor, tensor_in
from pipeline.adapter_layout import (
    ALIGNMENT,
    GROUPS,
    MODULES,
    AdapterLayout,
    layout,
    pack_ranks,
)
from pipeline.errors import RequestError

CHUNK_BYTES = 1 << 20  # of the packed adapter; a group that is larger is a chunk by itself
TRANSPOSED_COLUMNS = 16  # at a time: 32 or 64 bytes of each row


class Plan(msgspec.Struct, frozen=True, tag=True):
    """How a checkpoint will be packed. placed.nbytes is the size of the extent."""

    dtype: str
    ranks: bytes  # int16[layers, modules]
    placed: AdapterLayout
    modules: Modules


class _Matrix(NamedTuple):
    """One on its way from the file to the extent."""

    entry: TensorEntry
    offset: int  # bytes in the extent
    scaling: float | None  # of a B, which is transposed; None: an A


class _Chunk(NamedTuple):
    """Bytes start to end (exclusive) of the extent, and what lies there."""

    start: int
    end: int
    matrices: list[_Matrix]


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
    chunks = list(_chunks(plan))
    scratch = memoryview(bytearray(max(map(_scratch_bytes, chunks))))
    content = blake3(plan.ranks)
    for chunk in chunks:
        for matrix, source in _read(descriptor, chunk, extent, scratch, dtype):
            if matrix.scaling is None:
                store(source, extent, matrix.offset, dtype)
            else:
                scaled = _scaled(source, matrix.scaling, dtype)
                store_transposed(scaled, extent, matrix.offset, dtype)
        packed = extent[chunk.start : chunk.end]
        if not is_finite(torch.frombuffer(packed, dtype=dtype)):
            raise _not_finite(descriptor, chunk, plan.dtype)
        content.update(packed)
    return content.hexdigest()


def store(matrix: Tensor, extent: memoryview, offset: int, dtype: torch.dtype) -> Tensor:
    """Put a matrix into its place, row-major, and zero what is left until the next one.

    Returns what is stored, which lies in the extent.
    """
    target = _place(extent, offset, matrix.shape, dtype)
    target.copy_(matrix)
    return target


def store_transposed(matrix: Tensor, extent: memoryview, offset: int, dtype: torch.dtype) -> Tensor:
    """As `store(matrix.T, ...)`, several times as fast for a matrix of few columns."""
    target = _place(extent, offset, matrix.T.shape, dtype)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    rows, columns = target.view(bits).numpy(), matrix.to(dtype).view(bits).numpy()
    for first in range(0, len(rows), TRANSPOSED_COLUMNS):
        some = slice(first, first + TRANSPOSED_COLUMNS)
        np.copyto(rows[some], columns[:, some].T)
    return target


def digest(ranks: bytes, extent: memoryview) -> str:
    """Of a packed adapter: what tells contents apart."""
    return blake3(ranks).update(extent).hexdigest()


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


def _chunks(plan: Plan) -> Iterator[_Chunk]:
    """All of the extent, in order."""
    groups = list(_groups(plan))
    ends = [group[0].offset for group in groups[1:]] + [plan.placed.nbytes]
    start, matrices = 0, list[_Matrix]()
    for group, end in zip(groups, ends, strict=True):
        matrices += group
        if end - start >= CHUNK_BYTES or end == plan.placed.nbytes:
            yield _Chunk(start, end, matrices)
            start, matrices = end, []


def _groups(plan: Plan) -> Iterator[list[_Matrix]]:
    """The matrices of each group of the layout that has some, those of each in order."""
    for layer in range(len(plan.placed.placements) // len(MODULES)):
        for group in GROUPS:
            present = [
                (plan.modules[layer, module], plan.placed.at(layer, module))
                for module in group
                if (layer, module) in plan.modules
            ]
            if present:
                yield [
                    *(_Matrix(one.a, place.a_offset, None) for one, place in present),
                    *(_Matrix(one.b, place.b_offset, one.scaling) for one, place in present),
                ]


def _scratch_bytes(chunk: _Chunk) -> int:
    return sum(_aligned(matrix.entry.nbytes) for matrix in chunk.matrices)


def _read(
    descriptor: int, chunk: _Chunk, extent: memoryview, scratch: memoryview, dtype: torch.dtype
) -> list[tuple[_Matrix, Tensor]]:
    """Read all matrices of a chunk, neighbours in the file with one call.

    An A of the compute dtype is read into its place. Returns the others, which lie in `scratch`.
    """
    pending: list[tuple[_Matrix, Tensor]] = []
    buffers: list[memoryview] = []
    start = end = used = 0
    for matrix in sorted(chunk.matrices, key=lambda matrix: matrix.entry.offset):
        entry = matrix.entry
        if entry.offset != end:
            read_exactly(descriptor, buffers, start)
            buffers, start = [], entry.offset
        end = entry.offset + entry.nbytes
        if matrix.scaling is None and FILE_DTYPES[entry.dtype] is dtype:
            _place(extent, matrix.offset, entry.shape, dtype)
            buffers.append(extent[matrix.offset : matrix.offset + entry.nbytes])
            continue
        buffer = scratch[used : used + entry.nbytes]
        used += _aligned(entry.nbytes)
        pending.append((matrix, tensor_in(buffer, entry)))
        buffers.append(buffer)
    read_exactly(descriptor, buffers, start)
    return pending


def _scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Still to be rounded to dtype, unless it is that: then it was, once, from a product in fp32.

    May be `b` itself, changed.
    """
    if scaling == 1:
        return b
    return (b if b.dtype is dtype else b.float()).mul_(scaling)


def _not_finite(descriptor: int, chunk: _Chunk, dtype: str) -> RequestError:
    """Which tensor it is, after all of the chunk have been looked at together."""
    compute = DTYPES[dtype]
    for matrix in chunk.matrices:
        source = read_tensor(descriptor, matrix.entry)
        scaling = 1 if matrix.scaling is None else matrix.scaling
        scaled = _scaled(source.clone(), scaling, compute).to(compute)
        try:
            check_finite(matrix.entry, source, scaled, dtype)
        except RequestError as error:
            return error
    return unavailable(f"{WEIGHTS_FILE} changed while it was read")


def _place(extent: memoryview, offset: int, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Where a matrix goes. What is left until the next one, another adapter's, is zeroed."""
    rows, columns = shape
    end = offset + rows * columns * dtype.itemsize
    if end != _aligned(end):
        extent[end : _aligned(end)] = bytes(_aligned(end) - end)
    flat = torch.frombuffer(extent, dtype=dtype, count=rows * columns, offset=offset)
    return flat.view(rows, columns)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
