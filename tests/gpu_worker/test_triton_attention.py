"""Attention in Triton against that in plain torch, which test_attention.py holds to the formula."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.attention import AttentionBackend, StepSequences
from gpu_worker.attention.sdpa import SdpaAttention
from gpu_worker.attention.triton_decode import DecodePlan, DecodeTuning, decode
from gpu_worker.attention.triton_paged import TritonPagedAttention
from gpu_worker.attention.triton_prefill import PrefillTuning, make_tiles, prefill
from tests.gpu_worker.triton_device import DEVICE

SMALL = DecodeTuning(programs=12, least=16, block_n=16)


class Shape(NamedTuple):
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    block_tokens: int = 16


SHAPE = Shape()


class Case:
    """Sequences in a cache that is NaN wherever none of them has written.

    runs  (length, queries) of each sequence; decode rows first
    """

    def __init__(
        self,
        runs: list[tuple[int, int]],
        *,
        decode_rows: int = 0,
        shape: Shape = SHAPE,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(len(runs))
        self.shape, self.window, self.dtype = shape, window, dtype
        blocks = [-(-length // shape.block_tokens) for length, _ in runs]
        order = torch.randperm(sum(blocks) + 1, generator=generator).numpy()
        size = (len(order) + 1, 2, shape.kv_heads, shape.block_tokens, shape.head_dim)
        cache = torch.randn(size, generator=generator)
        page_table = np.full((len(runs), max(blocks) + 1), order[-1])
        cache[order[-1]] = torch.nan
        cache[-1] = 0
        for index, (length, _) in enumerate(runs):
            start = sum(blocks[:index])
            mine = order[start : start + blocks[index]]
            page_table[index, : len(mine)] = mine
            cache[mine[-1], :, :, (length - 1) % shape.block_tokens + 1 :] = torch.nan
        self.sequences = StepSequences(
            decode_rows=decode_rows,
            query_lengths=np.array([queries for _, queries in runs]),
            lengths=np.array([length for length, _ in runs]),
            page_table=page_table,
        )
        self.cache = cache.to(DEVICE, dtype)
        tokens = sum(queries for _, queries in runs)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv = torch.randn((tokens, width), generator=generator).to(DEVICE, dtype)
        self.q = qkv.view(tokens, -1, shape.head_dim)[:, : shape.heads]  # strided, as it comes

    def expected(self, windowed: bool = True) -> Tensor:
        """In fp32, with k and v out of the cache and zeros where it is NaN."""
        backend = SdpaAttention(
            kv_heads=self.shape.kv_heads,
            block_tokens=self.shape.block_tokens,
            null_block=len(self.cache) - 1,
            sliding_window=self.window,
            dtype=torch.float32,
            device=DEVICE,
        )
        return self._run(backend, self.cache.float().nan_to_num(0), self.q.float(), windowed)

    def got(self, windowed: bool = True) -> Tensor:
        backend = TritonPagedAttention(
            heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            sliding_window=self.window,
            dtype=self.dtype,
            device=DEVICE,
        )
        return self._run(backend, self.cache, self.q, windowed)

    def _run(self, backend: AttentionBackend, cache: Tensor, q: Tensor, windowed: bool) -> Tensor:
        k, v = torch.zeros((2, len(q), *cache.shape[2:5:2]), dtype=q.dtype, device=DEVICE)
        block_tokens, start = self.shape.block_tokens, 0
        for pages, length, count in zip(
            self.sequences.page_table,
            self.sequences.lengths,
            self.sequences.query_lengths,
            strict=True,
        ):
            for index in range(count):
                block, place = divmod(int(length - count) + index, block_tokens)
                k[start], v[start] = cache[int(pages[block]), :, :, place]
                start += 1
        return backend.plan(self.sequences).attend(q, k, v, cache, windowed)


def check(case: Case, windowed: bool = True) -> None:
    tolerance = 5e-3 if case.dtype == torch.float16 else 1e-5
    got = case.got(windowed).float()
    torch.testing.assert_close(got, case.expected(windowed), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
def test_rows_and_chunks_of_every_sort(window: int | None, dtype: torch.dtype) -> None:
    runs = [(1, 1), (16, 1), (17, 1), (300, 1), (1, 1), (9, 9), (70, 5), (33, 33), (200, 130)]
    check(Case(runs, decode_rows=4, window=window, dtype=dtype))


def test_a_layer_without_the_window_of_others() -> None:
    runs = [(50, 1), (40, 30)]
    check(Case(runs, decode_rows=1, window=8), windowed=False)


@pytest.mark.parametrize("block_tokens", [16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 70])
def test_blocks_of_every_size(block_tokens: int, window: int | None) -> None:
    shape = Shape(block_tokens=block_tokens)
    check(Case([(5, 1), (300, 1), (150, 20)], decode_rows=2, shape=shape, window=window))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=2, kv_heads=2, head_dim=64),
        Shape(heads=7, kv_heads=1, head_dim=96),
        Shape(heads=20, kv_heads=1, head_dim=16),
        Shape(heads=4, kv_heads=2, head_dim=256),
        Shape(heads=8, kv_heads=2, head_dim=128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_every_shape(shape: Shape, dtype: torch.dtype) -> None:
    check(Case([(3, 1), (130, 1), (40, 21)], decode_rows=2, shape=shape, dtype=dtype))


def on_device(array: NDArray[np.integer[Any]]) -> Tensor:
    return torch.from_numpy(array).to(DEVICE, torch.int32)


def decoded(case: Case, lengths: list[int], tuning: DecodeTuning = SMALL) -> Tensor:
    """The queries of a case with these lengths instead of its own."""
    s, rows = case.shape, len(lengths)
    plan = DecodePlan(
        rows=rows,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        window=case.window,
        device=DEVICE,
        tuning=tuning,
    )
    known = on_device(np.array(lengths))
    plan.update(known)
    out = torch.full((rows, s.heads, s.head_dim), torch.nan, device=DEVICE)
    pages = on_device(case.sequences.page_table)
    for _ in range(2):  # layers: what one leaves behind must suit the next
        decode(out, case.q, case.cache, pages, known, plan)
    return out.flatten(1)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("runs", [[(1000, 1)], [(400, 1), (3, 1), (90, 1), (17, 1)]])
def test_long_rows_are_cut_and_joined(runs: list[tuple[int, int]], window: int | None) -> None:
    case = Case(runs, decode_rows=len(runs), window=window)
    got = decoded(case, [length for length, _ in runs])
    torch.testing.assert_close(got, case.expected(), atol=1e-5, rtol=1e-5)


def test_rows_of_length_0_are_zeros() -> None:
    case = Case([(100, 1), (5, 1), (30, 1), (5, 1)], decode_rows=4)
    got, expected = decoded(case, [100, 0, 30, 0]), case.expected()
    expected[[1, 3]] = 0
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_nothing_but_padding() -> None:
    case = Case([(5, 1), (5, 1)], decode_rows=2)
    assert decoded(case, [0, 0]).eq(0).all()


@pytest.mark.parametrize("window", [None, 33])
def test_the_items_of_a_plan_cover_each_row_once(window: int | None) -> None:
    generator = np.random.default_rng(0)
    for rows in (1, 3, 16):
        for most in (1, 40, 5000):
            lengths = generator.integers(0, most + 1, rows)
            plan = DecodePlan(
                rows=rows,
                heads=4,
                kv_heads=2,
                head_dim=16,
                window=window,
                device=DEVICE,
                tuning=SMALL,
            )
            plan.items.fill_(9)  # what an earlier step may have left
            plan.update(on_device(lengths))
            first = np.maximum(lengths - window, 0) // 16 if window is not None else lengths * 0
            end, expected_end = plan.item_ends.tolist(), -(-lengths // 16)
            used = [item for item in plan.items.tolist() if item[3]]
            assert used == plan.items[: end[-1]].tolist()
            for row in range(rows):
                mine = [item for item in used if item[0] == row]
                assert len(mine) == mine[0][3]
                assert used[end[row] - len(mine) : end[row]] == mine
                tiles = [tile for _, start, stop, _ in mine for tile in range(start, stop)]
                assert tiles == list(range(first[row], expected_end[row]))


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_and_their_padding(block_m: int, window: int | None) -> None:
    case = Case([(9, 9), (70, 5), (133, 100), (16, 16)], window=window)
    s, counts = case.shape, case.sequences.query_lengths
    tiles = make_tiles(counts, s.heads // s.kv_heads, block_m)
    padded = np.concatenate((tiles, [[-1, 12345]])).astype(np.int32)
    out = torch.full(case.q.shape, torch.nan, device=DEVICE)
    prefill(
        out,
        case.q,
        case.cache,
        on_device(case.sequences.page_table),
        on_device(np.concatenate(([0], np.cumsum(counts)))),
        on_device(case.sequences.lengths),
        on_device(padded),
        window,
        PrefillTuning(block_m, block_n=16, warps=4),
    )
    torch.testing.assert_close(out.flatten(1), case.expected(), atol=1e-5, rtol=1e-5)


def test_a_plan_serves_its_number_of_rows_only() -> None:
    case = Case([(5, 1), (5, 1)], decode_rows=2)
    with pytest.raises(ValueError, match="3 rows"):
        decoded(case, [5, 5, 5])
