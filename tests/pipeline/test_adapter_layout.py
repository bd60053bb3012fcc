"""The packed layout of an adapter: nothing overlaps, and what is read together lies together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapter_layout import (
    ALIGNMENT,
    GROUPS,
    MODULES,
    AdapterLayout,
    ModuleShape,
    layout,
    pack_ranks,
    unpack_ranks,
)

sizes = st.integers(1, 70)
shapes_lists = st.lists(
    st.builds(ModuleShape, out_features=sizes, in_features=sizes),
    min_size=len(MODULES),
    max_size=len(MODULES),
)
ranks_lists = st.integers(0, 3).flatmap(
    lambda layers: st.lists(
        st.integers(0, 20), min_size=layers * len(MODULES), max_size=layers * len(MODULES)
    )
)
element_sizes = st.sampled_from([2, 4])


def extents(
    placed: AdapterLayout, shapes: list[ModuleShape], element_bytes: int
) -> list[tuple[int, int]]:
    """(start, end) of each matrix that takes bytes."""
    found = []
    for index, place in enumerate(placed.placements):
        shape = shapes[index % len(MODULES)]
        for offset, features in (
            (place.a_offset, shape.in_features),
            (place.b_offset, shape.out_features),
        ):
            found.append((offset, offset + place.rank * features * element_bytes))
    return sorted(extent for extent in found if extent[0] != extent[1])


@given(ranks=ranks_lists, shapes=shapes_lists, element_bytes=element_sizes)
def test_matrices_are_aligned_and_fill_the_adapter_without_overlap(
    ranks: list[int], shapes: list[ModuleShape], element_bytes: int
) -> None:
    placed = layout(ranks, shapes, element_bytes)
    end = 0
    for start, matrix_end in extents(placed, shapes, element_bytes):
        assert start % ALIGNMENT == 0
        assert 0 <= start - end < ALIGNMENT
        end = matrix_end
    assert 0 <= placed.nbytes - end < ALIGNMENT


@given(ranks=ranks_lists, shapes=shapes_lists, element_bytes=element_sizes)
def test_each_module_of_each_layer_keeps_its_exact_rank(
    ranks: list[int], shapes: list[ModuleShape], element_bytes: int
) -> None:
    placed = layout(ranks, shapes, element_bytes)
    assert [place.rank for place in placed.placements] == ranks
    for layer in range(len(ranks) // len(MODULES)):
        for module in range(len(MODULES)):
            assert placed.at(layer, module).rank == ranks[layer * len(MODULES) + module]


@given(ranks=ranks_lists, inputs=st.integers(1, 9), element_bytes=element_sizes)
def test_the_as_of_a_group_are_one_matrix(
    ranks: list[int], inputs: int, element_bytes: int
) -> None:
    shapes = [ModuleShape(out_features=24, in_features=inputs * ALIGNMENT)] * len(MODULES)
    placed = layout(ranks, shapes, element_bytes)
    for layer in range(len(ranks) // len(MODULES)):
        for group in GROUPS:
            places = [placed.at(layer, module) for module in group]
            following = places[0].a_offset
            for place in places:
                assert place.a_offset == following
                following += place.rank * inputs * ALIGNMENT * element_bytes


def test_without_any_module_an_adapter_takes_no_bytes() -> None:
    shapes = [ModuleShape(8, 8)] * len(MODULES)
    assert layout([0] * 14, shapes, 2).nbytes == 0
    assert layout([], shapes, 2).nbytes == 0


def test_the_bytes_of_a_rank_16_adapter_of_an_8b_model() -> None:
    q, kv, hidden, intermediate = 4096, 1024, 4096, 14336
    outputs_and_inputs = [
        (q, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, q),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ]
    shapes = [ModuleShape(*each) for each in outputs_and_inputs]
    elements = sum(16 * (outputs + inputs) for outputs, inputs in outputs_and_inputs)
    assert layout([16] * 32 * len(MODULES), shapes, 2).nbytes == 32 * elements * 2 == 83_886_080


def test_ranks_that_are_not_whole_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="8 ranks are not whole layers of 7 modules"):
        layout([1] * 8, [ModuleShape(8, 8)] * 7, 2)


@given(ranks=st.lists(st.integers(0, 512)))
def test_ranks_travel_as_two_bytes_each(ranks: list[int]) -> None:
    packed = pack_ranks(ranks)
    assert len(packed) == 2 * len(ranks)
    assert list(unpack_ranks(packed)) == ranks


def test_the_groups_name_each_module_once() -> None:
    assert sorted(module for group in GROUPS for module in group) == list(range(len(MODULES)))
