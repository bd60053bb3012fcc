"""Embeddings as they travel from the device to the frontend: float32, one after the other. Pure."""

import math
import struct

_FIRST = struct.Struct("<f")


def split(embeddings: bytes, count: int) -> list[bytes]:
    """Them one by one; `count` is at least 1. Raises ValueError if they are not so many."""
    size, rest = divmod(len(embeddings), count)
    if rest or not size or size % _FIRST.size:
        raise ValueError(f"{len(embeddings)} bytes are not {count} embeddings")
    return [embeddings[start : start + size] for start in range(0, len(embeddings), size)]


def is_finite(embedding: bytes) -> bool:
    """Whether it can be told; one that is not finite is all NaN."""
    return math.isfinite(_FIRST.unpack_from(embedding)[0])
