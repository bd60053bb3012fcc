"""The header of a safetensors file, read as safetensors reads it, whatever bytes it has."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from adapter_loader.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    header_bytes,
    parse_header,
)
from pipeline.errors import RequestError
from tests.adapter_loader.adapters import entries_of, safetensors_bytes


def parse(file: bytes) -> list[TensorEntry]:
    size = header_bytes(file[:LENGTH_BYTES], len(file))
    return parse_header(file[LENGTH_BYTES : LENGTH_BYTES + size], len(file))


def parses(file: bytes) -> list[TensorEntry] | None:
    try:
        return parse(file)
    except RequestError:  # anything else is an error of ours
        return None


names = st.text(max_size=20).filter(lambda name: name != "__metadata__")
arrays = st.lists(st.integers(0, 4), max_size=3).map(lambda shape: np.ones(shape, np.float32))
GOOD = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, {"format": "pt"})


@given(st.dictionaries(names, arrays, max_size=6), st.none() | st.just({"format": "pt"}))
def test_what_safetensors_writes_is_read_back(
    tensors: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    file = save(tensors, metadata)
    entries = parse(file)
    assert {entry.name: entry.shape for entry in entries} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    for entry in entries:
        stored = file[entry.offset : entry.offset + entry.nbytes]
        assert stored == tensors[entry.name].tobytes()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(file: bytes) -> None:
    parses(file)


@given(st.binary(max_size=200), st.integers(0, 50))
def test_any_header_bytes_are_read_or_refused(header: bytes, body: int) -> None:
    parses(safetensors_bytes(header, bytes(body)))


numbers = st.integers() | st.floats(allow_nan=False) | st.none() | st.booleans()
values = st.recursive(
    numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
sizes = st.integers(-2, 20) | st.integers()
likely = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", ""]) | values,
        "shape": st.lists(sizes, max_size=4) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)


@given(st.dictionaries(names, likely | values, max_size=4), st.integers(0, 60))
def test_any_json_header_is_read_or_refused(header: dict[str, Any], body: int) -> None:
    parses(safetensors_bytes(header, bytes(body)))


@settings(max_examples=300)
@given(st.data())
def test_a_file_with_some_bytes_changed_is_read_as_safetensors_does_or_refused(
    data: st.DataObject,
) -> None:
    file = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    entries = parses(bytes(file))
    if entries is None:
        return
    expected = load(bytes(file))
    assert {entry.name: entry.shape for entry in entries} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@given(st.permutations(["a", "b", "c"]), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_entries_come_in_the_order_of_the_file(order: list[str], sizes: list[int]) -> None:
    header = entries_of([(name, "F32", [n], 4 * n) for name, n in zip("abc", sizes, strict=True)])
    shuffled = {name: header[name] for name in order}
    file = safetensors_bytes(shuffled, bytes(4 * sum(sizes)))
    assert [entry.name for entry in parse(file)] == ["a", "b", "c"]


def test_the_bound_of_the_header_holds_for_files_that_are_that_large() -> None:
    file_bytes = 1 << 40
    assert header_bytes(MAX_HEADER_BYTES.to_bytes(8, "little"), file_bytes) == MAX_HEADER_BYTES
    with pytest.raises(RequestError, match="is the most"):
        header_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), file_bytes)


def test_a_hostile_header_takes_little_memory() -> None:
    hostile = json.dumps({"a": {"dtype": "F32", "shape": [1 << 60] * 8, "data_offsets": [0, 4]}})
    nested = b'{"a":' + b"[" * 500_000
    numbers = b'{"a":' + b"9" * 500_000 + b"}"
    tracemalloc.start()
    for header in (hostile.encode(), nested, numbers):
        assert parses(safetensors_bytes(header, bytes(4))) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
