"""Whatever an adapter's two files hold, it is packed, or refused with one sentence.

FUZZ_CASES=100000 pytest tests/adapter_loader/test_checkpoint_fuzz.py makes as many cases.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from adapter_loader.checkpoint import BaseModel, check
from adapter_loader.packing import pack, plan
from adapter_loader.peft_config import parse_peft_config
from pipeline.adapter_layout import MODULES, ModuleShape
from pipeline.errors import RequestError
from pipeline.messages import FailureKind
from tests.adapter_loader.adapters import entries_of, safetensors_bytes, tensor_name

CASES = int(os.environ.get("FUZZ_CASES", "400"))
BASE = BaseModel(2, tuple(ModuleShape(out_features=4, in_features=8) for _ in MODULES), "float16")
RANK = 2
Json = dict[str, Any]


def good_header() -> Json:
    tensors = [
        (tensor_name(layer, module, side), "F32", shape, 4 * shape[0] * shape[1])
        for layer in range(BASE.layers)
        for module in ("q_proj", "up_proj")
        for side, shape in (("A", [RANK, 8]), ("B", [4, RANK]))
    ]
    return entries_of(tensors)


HEADER = good_header()
BODY_BYTES = max(entry["data_offsets"][1] for entry in HEADER.values())
CONFIG: Json = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "rank_pattern": {"x": 1}}

numbers = (
    st.integers(-4, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from([1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30, 100_000, 512, 513])
)
texts = st.text(max_size=12) | st.sampled_from(
    ["", "\0", "\n", "..", "/", "\ud800", "F32", "F16", "F64", "I8", "LORA", "q_proj", "1.mlp"]
)
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = (
    st.sampled_from(list(HEADER))
    | st.builds(
        tensor_name,
        st.integers(0, 3) | st.integers(),
        st.sampled_from([*MODULES, "lm_head", "w"]),
        st.sampled_from(["A", "B", "C", "magnitude"]),
        st.sampled_from(["", ".default", ".x"]),
    )
    | texts
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16"]) | values,
        "shape": st.lists(st.integers(0, 8), min_size=2, max_size=2) | values,
        "data_offsets": st.lists(st.integers(0, BODY_BYTES), min_size=2, max_size=2) | values,
    }
)
keys = st.sampled_from(
    [
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "use_dora"),
        *("peft_type", "task_type", "init_lora_weights", "base_model_name_or_path"),
        "target_modules",
    ]
)
plain = st.text("q_proj.1^$-", min_size=1, max_size=8)  # what is matched without another process
tables = st.dictionaries(plain, numbers, max_size=3)

change_of_header = st.one_of(
    st.builds(lambda name, entry: lambda header: header.update({name: entry}), names, entries),
    st.builds(lambda name, value: lambda header: header.update({name: value}), names, values),
    st.builds(lambda name: lambda header: header.pop(name, None), names),
    st.builds(
        lambda name, key, value: lambda header: header[name].update({key: value}),
        st.sampled_from(list(HEADER)),
        st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
        values,
    ),
)
change_of_config = st.builds(
    lambda key, value: lambda config: config.update({key: value}),
    keys | texts,
    tables | leaves | st.lists(leaves, max_size=3),
)
change_of_bytes = st.builds(
    lambda at, new: (
        lambda data: (
            data.__setitem__(slice(at % (len(data) + 1), None), new)
            if len(new) > 3
            else data.__setitem__(slice(at % (len(data) + 1), at % (len(data) + 1) + len(new)), new)
        )
    ),
    st.integers(0, 10_000),
    st.binary(max_size=6),
)
floats = st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])


def few(change: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Callable[[Any], None]]]:
    return st.lists(change, max_size=2)


def changed(value: Any, changes: list[Callable[[Any], None]]) -> Any:
    for change in changes:
        try:
            change(value)
        except (AttributeError, KeyError):  # an earlier change has taken what it is about
            continue
    return value


@pytest.fixture(scope="module")
def descriptor() -> Iterator[int]:
    """Of a file that each case is written to."""
    opened = os.memfd_create("fuzz")
    yield opened
    os.close(opened)


def outcome(descriptor: int, config: bytes, weights: bytes) -> str | RequestError:
    """As the loader has it: the digest of what was packed, or the refusal."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, weights, 0)
    try:
        modules = check(descriptor, len(weights), parse_peft_config(config), BASE)
        planned = plan(modules, BASE)
        return pack(descriptor, planned, memoryview(bytearray(planned.placed.nbytes)))
    except RequestError as error:
        return error


def assert_sound(found: str | RequestError) -> None:
    if isinstance(found, RequestError):
        assert found.kind == FailureKind.ADAPTER_INVALID
        assert found.message.isprintable()
        assert found.message.isascii()
        assert 10 < len(found.message) < 1000
    else:
        assert len(found) == 64


def test_what_the_cases_are_made_of_is_packed(descriptor: int) -> None:
    weights = safetensors_bytes(HEADER, bytes(BODY_BYTES))
    assert isinstance(outcome(descriptor, json.dumps(CONFIG).encode(), weights), str)


@settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    of_header=few(change_of_header),
    of_config=few(change_of_config),
    of_bytes=few(change_of_bytes),
    of_text=few(change_of_bytes),
    value=st.none() | st.tuples(st.integers(0, BODY_BYTES - 4), floats),
)
def test_whatever_they_hold_the_files_are_packed_or_refused(
    descriptor: int,
    of_header: list[Callable[[Json], None]],
    of_config: list[Callable[[Json], None]],
    of_bytes: list[Callable[[bytearray], None]],
    of_text: list[Callable[[bytearray], None]],
    value: tuple[int, bytes] | None,
) -> None:
    body = bytearray(BODY_BYTES)
    if value is not None:
        body[value[0] : value[0] + 4] = value[1]
    header = changed(json.loads(json.dumps(HEADER)), of_header)
    config = changed(dict(CONFIG), of_config)
    weights = changed(bytearray(safetensors_bytes(header, bytes(body))), of_bytes)
    text = changed(bytearray(json.dumps(config).encode()), of_text)
    found = outcome(descriptor, bytes(text), bytes(weights))
    event("refused" if isinstance(found, RequestError) else "packed")
    assert_sound(found)
