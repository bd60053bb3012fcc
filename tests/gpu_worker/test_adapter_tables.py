"""The table of addresses against adapter_layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.kernels.adapter_tables import HEAD, RECORD, AdapterTables
from pipeline.adapter_layout import GROUPS, MODULES, ModuleShape, layout
from tests.gpu_worker.lora import make_shapes

LAYERS = 3
CPU = torch.device("cpu")
ranks = st.lists(
    st.sampled_from([0, 1, 7, 8, 512]),
    min_size=LAYERS * len(MODULES),
    max_size=LAYERS * len(MODULES),
)


def make_tables(dtype: torch.dtype = torch.bfloat16) -> AdapterTables:
    return AdapterTables(shapes=SHAPES, layers=LAYERS, slots=2, dtype=dtype, device=CPU)


SHAPES = make_shapes(hidden=40, kv=24, intermediate=56)


@given(ranks, st.sampled_from([torch.bfloat16, torch.float32]))
def test_records_say_what_the_layout_says(of_adapter: list[int], dtype: torch.dtype) -> None:
    tables = make_tables(dtype)
    tables.fill(1, 1 << 40, of_adapter)
    assert not tables.table[0].any()

    places = layout(of_adapter, SHAPES, dtype.itemsize)
    row = tables.table[1].tolist()
    for index, group in enumerate(GROUPS):
        stacked = []
        for layer in range(LAYERS):
            start = 0
            for module in group:
                place, record = places.at(layer, module), tables.record(layer, module)
                addresses = [(1 << 40) + place.a_offset, (1 << 40) + place.b_offset]
                assert row[record : record + RECORD] == [*addresses, place.rank, start]
                start += place.rank
            stacked.append(start)
        assert row[index] == max(stacked)
    assert len(row) == HEAD + LAYERS * len(MODULES) * RECORD


@given(ranks)
def test_layers_take_what_the_layout_says(of_adapter: list[int]) -> None:
    layers = make_tables().layer_bytes(of_adapter)
    per_layer = [of_adapter[at : at + len(MODULES)] for at in range(0, len(of_adapter), 7)]
    assert layers.tolist() == [layout(one, SHAPES, 2).nbytes for one in per_layer]
    assert layers.sum() == layout(of_adapter, SHAPES, 2).nbytes


def test_a_slot_can_be_filled_again() -> None:
    tables, other = make_tables(), make_tables()
    tables.fill(0, 16, [8] * LAYERS * len(MODULES))
    for made in (tables, other):
        made.fill(0, 32, [0, 4, 1, 0, 0, 2, 3] * LAYERS)
    assert torch.equal(tables.table, other.table)


def test_an_adapter_can_be_shifted() -> None:
    tables, other = make_tables(), make_tables()
    of_adapter = [0, 4, 1, 0, 0, 2, 3] * LAYERS
    tables.fill(0, 512, of_adapter)
    tables.shift(0, -256)
    other.fill(0, 256, of_adapter)
    assert torch.equal(tables.table, other.table)


def test_ranks_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="for 3 layers"):
        make_tables().fill(0, 16, [8] * len(MODULES))


def test_tables_are_for_as_that_follow_each_other() -> None:
    shapes = tuple(ModuleShape(8, 9) for _ in MODULES)
    with pytest.raises(ValueError, match="not one matrix"):
        AdapterTables(shapes=shapes, layers=1, slots=1, dtype=torch.float32, device=CPU)
