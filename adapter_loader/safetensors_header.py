"""The header of a safetensors file: which tensors it holds, and where.

    8 bytes                     n bytes     the rest
    n, little-endian unsigned   JSON        the tensors, one after another without gaps

The JSON is {name: {"dtype", "shape", "data_offsets": [start, end)}}, offsets counted from the end
of the header, and may hold strings under "__metadata__". Every number in it is somebody else's,
so nothing is read or allocated by one before it is checked against the size of the file.
"""

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from adapter_loader.refusals import invalid, shown
from adapter_loader.sources import WEIGHTS_FILE

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 << 20  # an adapter of 100 layers and 7 modules has 0.2 MB
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_Count = Annotated[int, Meta(ge=0, le=1 << 62)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Count], Meta(max_length=8)]
    data_offsets: tuple[_Count, _Count]


class TensorEntry(msgspec.Struct, frozen=True, gc=False):
    """A tensor of the file, row-major, little-endian."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start
    nbytes: int


def header_bytes(length: bytes, file_bytes: int) -> int:
    """How long the JSON is. `length` is the file's first 8 bytes. Raises RequestError."""
    size = int.from_bytes(length, "little")
    if len(length) < LENGTH_BYTES or file_bytes < LENGTH_BYTES + size:
        raise invalid(f"{WEIGHTS_FILE} is truncated or is not a safetensors file")
    if size > MAX_HEADER_BYTES:
        raise invalid(
            f"{WEIGHTS_FILE} has a header of {size} bytes, and {MAX_HEADER_BYTES} is the most"
        )
    return size


def parse_header(data: bytes, file_bytes: int) -> list[TensorEntry]:
    """The tensors in the order of the file. `data` is the JSON. Raises RequestError."""
    start = LENGTH_BYTES + len(data)
    try:
        raw = msgspec.json.decode(data.decode(), type=dict[str, msgspec.Raw])
        msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = [
            _entry(name, msgspec.json.decode(value, type=_Entry), start)
            for name, value in raw.items()
        ]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = shown(str(error))[1:-1]
        raise invalid(f"{WEIGHTS_FILE} has a bad header ({reason})") from error
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = start
    for entry in entries:
        if entry.offset != end:
            raise invalid(f"{WEIGHTS_FILE} has a gap or an overlap before {shown(entry.name)}")
        end += entry.nbytes
    if end != file_bytes:
        raise invalid(
            f"{WEIGHTS_FILE} is truncated or damaged: it has {file_bytes} bytes, "
            f"and its header speaks of {end}"
        )
    return entries


def _entry(name: str, entry: _Entry, start: int) -> TensorEntry:
    element_bytes = DTYPE_BYTES.get(entry.dtype)
    if element_bytes is None:
        raise invalid(
            f"tensor {shown(name)} has the dtype {shown(entry.dtype)}, "
            f"and only {', '.join(DTYPE_BYTES)} are supported"
        )
    first, last = entry.data_offsets
    nbytes = math.prod(entry.shape) * element_bytes
    if last - first != nbytes:
        raise invalid(f"tensor {shown(name)} has offsets that do not fit its shape")
    return TensorEntry(name, entry.dtype, tuple(entry.shape), start + first, nbytes)
