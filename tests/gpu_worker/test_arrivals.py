"""How an adapter is cut into chunks of layers."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.arrivals import CHUNK_BYTES, CHUNKS, Chunk, make_chunks

layer_bytes = st.lists(
    st.sampled_from([0, 16, CHUNK_BYTES // 3, CHUNK_BYTES, 5 * CHUNK_BYTES]),
    min_size=1,
    max_size=40,
).map(lambda layers: np.array(layers, np.int64))


@given(layer_bytes)
def test_chunks_hold_all_layers_and_bytes_in_order(layers: np.ndarray) -> None:
    chunks = make_chunks(layers)
    assert 1 <= len(chunks) <= CHUNKS
    assert (chunks[0].first_layer, chunks[0].start) == (0, 0)
    assert chunks[-1].end == layers.sum()
    for one, other in itertools.pairwise(chunks):
        assert one.end == other.start
        assert one.first_layer < other.first_layer
        assert layers[: other.first_layer].sum() == one.end


def test_a_small_adapter_is_one_chunk() -> None:
    assert make_chunks(np.full(30, 1000)) == [Chunk(0, 0, 30_000)]


def test_a_large_adapter_is_cut_into_equal_parts() -> None:
    of_layer = 84_000_000 // 32
    chunks = make_chunks(np.full(32, of_layer))
    assert [chunk.first_layer for chunk in chunks] == list(range(0, 32, 32 // CHUNKS))
    assert {chunk.end - chunk.start for chunk in chunks} == {of_layer * 32 // CHUNKS}
